"""A line from a test to the inside of a node's process: mischief on order, and a look at its books.

Every node that the zygote forks listens on an abstract Unix socket of its own (no file, nothing
left behind). One JSON line in, one out:

    ["order", "strike", {"point": "chunk_sent", "act": "kill"}]  →  null
    ["look"]                                                     →  Books
    ["behave"]                                                   →  null, and all mischief is over

The node's own event loop serves it: an order takes effect between two events, never within one.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import traceback
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from tests.e2e import damage  # noqa: F401  (registers its mischief)
from tests.e2e.mischief import MISCHIEF, Inside

if TYPE_CHECKING:
    from node.shell import NodeShell


class Books(TypedDict):
    """What a node believes to hold."""

    blocks: dict[str, int]  # by state
    attempts: int
    leases: list[tuple[int, str]]  # number and state of those that are open, given or taken
    ports: dict[str, int]  # where other nodes reach it: "peer", and its transports over TCP
    contradiction: str  # what `check_integrity` says, empty where all is well
    done: list[str]  # what mischief did, in order


def address(pid: int) -> str:
    return f"\0baton-inside-{pid}"


def ask(pid: int, *command: object, timeout_s: float = 30.0) -> Any:
    """From the test: one command to the node with this process id."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(timeout_s)
        line.connect(address(pid))
        line.sendall(json.dumps(command).encode() + b"\n")
        answer = json.loads(line.makefile().readline())
    assert "error" not in answer, answer["error"]
    return answer["result"]


def open_line(orders: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """In the process, before its `main`: carry out the first orders; a node listens for more."""
    from node.shell import NodeShell

    inside = Inside()
    for name, arguments in orders:
        MISCHIEF[name](inside, **arguments)
    run = NodeShell.run

    async def run_with_line(shell: NodeShell) -> int:
        inside.shell = shell
        serve = partial(_serve, inside)
        async with await asyncio.start_unix_server(serve, address(os.getpid())):
            return await run(shell)

    setattr(NodeShell, "run", run_with_line)  # noqa: B010


async def _serve(
    inside: Inside, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        answer = {"result": _obey(inside, json.loads(await reader.readline()))}
    except Exception:
        answer = {"error": traceback.format_exc()}
    writer.write(json.dumps(answer).encode() + b"\n")
    writer.close()


def _obey(inside: Inside, command: list[Any]) -> Any:
    match command:
        case ["order", name, arguments]:
            return MISCHIEF[name](inside, **arguments)
        case ["behave"]:
            return inside.behave()
        case ["look"]:
            return _look(inside)
    raise ValueError(f"no such command: {command}")


def _look(inside: Inside) -> Books:
    shell = inside.shell
    assert shell is not None
    counts = shell.engine.block_counts()
    return Books(
        blocks={name: getattr(counts, name) for name in counts.__slots__},
        attempts=inside.role.num_attempts,
        leases=inside.leases,
        ports=inside.ports,
        contradiction=_contradiction(shell),
        done=inside.done,
    )


def _contradiction(shell: NodeShell) -> str:
    try:
        shell.engine.check_integrity()
    except AssertionError as error:
        return str(error) or "an assertion"
    return ""
