"""Named mischief that a test can make inside a node's process: deaths, damage, and blindness.

Three kinds. A *strike* stops or kills the process at a point of the handoff. *Damage* changes what
travels. *Blindness* switches off one check, for the controls: a damage that nobody looks for must
reach the answer, or the test of that check could not see it.

Everything is done by wrapping functions of the running process, and undone by `behave`.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from engine.plan import RequestProgress, StepResult
from engine.request import Request
from node import router_link
from wire import sockets
from wire.types import AttemptId

if TYPE_CHECKING:
    from node.shell import NodeShell

Call = Callable[..., Any]


class Inside:
    """A node's process as mischief sees it: the shell, once there is one, and what is wrapped."""

    def __init__(self) -> None:
        self.shell: NodeShell | None = None
        self.done: list[str] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def role(self) -> Any:
        assert self.shell is not None, "the node has not started yet"
        return self.shell._role

    @property
    def leases(self) -> list[tuple[int, str]]:
        """Number and state of a decode node's live leases, or of a prefill node's handoffs."""
        told = []
        for role in getattr(self.role, "_halves", [self.role]):
            if role.name == "decode":
                leases = role._receiver.table._leases.values()
                told += [(lease.number, lease.state.name) for lease in leases]
            else:
                handoffs = [out.handoff for out in role._sender._outgoing.values()]
                told += [(handoff.grant.lease, handoff.state.name) for handoff in handoffs]
        return told

    @property
    def ports(self) -> dict[str, int]:
        """Where other nodes reach this one over TCP."""
        assert self.shell is not None
        urls = {address.transport: address.url for address in self.role.transports}
        urls["peer"] = self.shell.peer_url
        return {
            name: int(url.rpartition(":")[2])
            for name, url in urls.items()
            if url.startswith("tcp:")
        }

    def wrap(self, owner: Any, name: str, around: Call) -> None:
        """Replace `owner.name` by `around(original, *arguments)`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self.replace(owner, name, wrapped)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        original = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, original))

    def behave(self) -> None:
        """Undo everything, latest first."""
        while self._undo:
            self._undo.pop()()
        self.done.clear()


MISCHIEF: dict[str, Callable[..., None]] = {}


def mischief(function: Callable[..., None]) -> Callable[..., None]:
    """Make it known by its name."""
    MISCHIEF[function.__name__] = function
    return function


# ---------------------------------------------------------------- strikes

POINTS = {
    # prefill node
    "accepted": ("kvtransfer.sender", "KVSender", "start", "after"),
    "chunk_sent": ("kvtransfer.sender", "KVSender", "blocks_finished", "after"),
    "before_commit": ("kvtransfer.sender", "KVSender", "first_token", "before"),
    "commit_sent": ("kvtransfer.sender", "KVSender", "first_token", "after"),
    "commit_answered": ("kvtransfer.handoff", "Handoff", "committed", "before"),
    # decode node
    "granted": ("kvtransfer.receiver", "KVReceiver", "grant", "after"),
    "unit_landed": ("kvtransfer.lease_table", "LeaseTable", "end_units", "after"),
    "before_verdict": ("kvtransfer.lease_table", "LeaseTable", "commit", "before"),
    "committed": ("engine.engine", "Engine", "adopt", "after"),
    "token": ("decode_node.role", "DecodeRole", "on_step", "after"),
}


@mischief
def strike(inside: Inside, *, point: str, act: str, nth: int = 1, retries: bool = False) -> None:
    """Stop or kill this process when first attempts (and `retries`) are at `point` the nth time."""
    module, owner, name, when = POINTS[point]
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[act]
    count = 0

    def around(original: Call, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += retries or _attempt(args) == 1
        struck = count == nth
        count += struck  # once
        if struck and when == "before":
            _hit(number)
        result = original(*args, **kwargs)
        if struck and when == "after":
            _hit(number)
        return result

    inside.wrap(getattr(__import__(module, fromlist=[owner]), owner), name, around)


def _hit(number: signal.Signals) -> None:
    """To this thread: a signal to the process would let it go on for a moment."""
    signal.pthread_kill(threading.get_ident(), number)


def _attempt(args: tuple[Any, ...]) -> int | None:
    """Which attempt a call is about: an id, or something that has one, or a step's first result."""
    for value in (*args[1:], args[0]):
        id = value if isinstance(value, AttemptId) else getattr(value, "id", None)
        if isinstance(id, AttemptId):
            return id.attempt
        if isinstance(value, StepResult) and value.progress:
            value = value.progress[0]
        if isinstance(value, Request | RequestProgress):
            return int(value.request_id.rpartition("/")[2])
    return None


# ---------------------------------------------------------------- narrowness


@mischief
def narrow_links(inside: Inside, *, num_messages: int, num_bytes: int) -> None:
    """Node or router, from its start: little fits between them, and silence alone ends nothing."""

    def set_limits(original: Call, socket: zmq.Socket[bytes]) -> None:
        original(socket)
        socket.sndhwm = num_messages
        socket.sndbuf = socket.rcvbuf = num_bytes

    inside.wrap(sockets, "_set_limits", set_limits)
    inside.replace(router_link, "_ROUTER_TIMEOUT_S", 600.0)
