"""A process that has imported everything once and forks nodes and routers on request.

Starting a node costs seconds of imports; a fork of this process is there in a moment. It reads one
JSON command per line on stdin and answers with one JSON line on stdout:

    {"module": "baton.node", "argv": [...], "log": "/path", "orders": [...]}
                                                               →  {"pid": 123}
    {"wait": 123, "timeout_s": 10}                             →  {"code": 0}, or null if it runs

Children are killed when stdin closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from typing import Any


def warm_up() -> None:
    """Import what every node needs, and the model class; no thread may be started here."""
    for module in (
        "node.build",
        "node.shell",
        "baton.node",
        "prefill_node.role",
        "decode_node.role",
        "router.__main__",
        "tests.e2e.inside",
        "transformers.models.llama.modeling_llama",
    ):
        import_module(module)


def run_child(command: dict[str, Any]) -> int:
    """The forked process: its output goes to the log, its exit code is the program's."""
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        import_module("tests.e2e.inside").open_line(command["orders"])
        code: int = import_module(command["module"]).main(command["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(pid: int, timeout_s: float) -> int | None:
    """The exit code (negative: the signal), or None while it still runs."""
    deadline = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def main() -> None:
    """Serve commands until stdin closes."""
    warm_up()
    children: set[int] = set()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            code = wait(command["wait"], command["timeout_s"])
            if code is not None:
                children.discard(command["wait"])
            print(json.dumps({"code": code}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(run_child(command))
        children.add(pid)
        print(json.dumps({"pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
