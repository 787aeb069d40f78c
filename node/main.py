"""What `baton prefill`, `decode` and `mixed` do; `python -m prefill_node` has one role alone."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import zmq

from node.config import NodeConfig, split_url
from node.flags import add_arguments, add_decode_arguments, from_args
from node.tokenizer_files import read_tokenizer
from telemetry.logs import set_up_logging
from telemetry.progress import ProgressLine
from wire.curve import SILENCE, knock
from wire.descriptors import allow_many
from wire.errors import BatonError, ConfigError
from wire.fleet_key import FleetKey, load_key
from wire.types import Role as RoleName
from wire.types import new_node_id

if TYPE_CHECKING:
    from node.role import Role
    from node.shell import NodeShell  # loads torch: only once the flags are known to be right


log = logging.getLogger(__name__)

_KNOCK_S = 1.0
MakeRoles: TypeAlias = "Mapping[RoleName, Callable[[NodeShell], Role]]"


def main(role: RoleName, make_role: MakeRoles, argv: Sequence[str] | None) -> int:
    """Parse flags and run a node that begins with `role`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"baton {role}",
        description=_DESCRIPTIONS[role],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    if RoleName.DECODE in make_role:
        add_decode_arguments(parser)
    args = parser.parse_args(argv)
    try:
        config = from_args(args, role=role, pid=os.getpid())
        set_up_logging(config.name, args.log_level)
        allow_many()
        return run_node(role, make_role, config)
    except BatonError as error:
        print(f"baton {role}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model loads; later a signal handler drains
        return 130


def run_node(role: RoleName, make_role: MakeRoles, config: NodeConfig) -> int:
    """Wait for a router, load the model, serve. Raises ConfigError with what to do."""
    from node.build import build_engine
    from node.shell import NodeShell

    if not config.model.is_dir():
        raise ConfigError(f"there is no model folder {str(config.model)!r}")
    tokenizer = read_tokenizer(config.model)
    wait_for_routers(config.routers, load_key(config.key_file), config.router_timeout_s)
    with ProgressLine(f"{config.name}: loading {config.model.name}") as progress:
        built = build_engine(make_role, config, progress.update)

    def tell_ready(http_url: str) -> None:
        with suppress(BrokenPipeError):  # nobody has to read it
            print(f"baton {role} ready name={config.name} http={http_url}", flush=True)

    async def run() -> int:
        me = new_node_id(config.name)
        return await NodeShell(config, built, tokenizer, role, make_role, me, tell_ready).run()

    return asyncio.run(run())


def leave(code: int) -> NoReturn:
    """End the process now: the interpreter would take apart torch and transformers for a second."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it
            stream.flush()
    os._exit(code)


def wait_for_routers(urls: Sequence[str], key: FleetKey | None, timeout_s: float) -> None:
    """Return when every router has shaken hands. Raises ConfigError after the timeout."""
    deadline = time.monotonic() + timeout_s
    for url in urls:
        told = None
        while (obstacle := _obstacle(url, key)) is not None:
            if time.monotonic() >= deadline:
                raise ConfigError(f"{obstacle} (asked for {timeout_s:g} s)")
            if obstacle != told:
                log.info("%s; asking on", obstacle)
            told = obstacle
            time.sleep(0.1)


def _obstacle(url: str, key: FleetKey | None) -> str | None:
    """Why there is no talking with the router; None if there is."""
    try:
        reason = knock(url, key, _KNOCK_S)
    except zmq.ZMQError as error:
        reason = error.strerror
    else:
        if reason is None:
            return None
        if reason != SILENCE:
            return f"router {url} does not let this node in: {reason}"
    return (
        f"no router at {url} ({_connection_error(url) or reason}); start `baton router` there or "
        "give its control address with --router"
    )


def _connection_error(url: str) -> str | None:
    try:
        socket.create_connection(split_url(url), timeout=2.0).close()
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError:  # of a name that no host can have
        return "not a host name"
    return None


_DESCRIPTIONS = {
    RoleName.PREFILL: """\
Start a prefill node: it computes the KV cache of prompts and hands it to decode nodes.

  baton prefill ./my-model --router tcp://127.0.0.1:7400""",
    RoleName.DECODE: """\
Start a decode node: it receives the KV cache of prompts and generates the answers.

  baton decode ./my-model --router tcp://127.0.0.1:7400""",
    RoleName.MIXED: """\
Start a mixed node: it serves requests alone, from the prompt to the answer's end. Beside prefill
and decode nodes it takes what prefill nodes hand over, and computes prompts where they are busy.

  baton mixed ./my-model --router tcp://127.0.0.1:7400""",
}
