"""UCX in the event loop: is it there, how is it set up, and who drives it.

A UCX worker does nothing by itself. Here its file descriptor wakes the loop, the loop lets it work
until there is nothing left to do, and *arms* it: only an armed worker signals its descriptor again.
So an idle worker costs nothing, and everything happens on the loop's thread.

This uses the synchronous layer of ucxx. Its asyncio layer has one context per process, needs a
running coroutine per connection, and polls requests in a loop of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from wire.errors import ConfigError

log = logging.getLogger(__name__)

ANY_TAG = 0
EVERY_BIT = (1 << 64) - 1

_TURN_S = 0.002  # then the loop gets its turn again
_TICK_S = 0.25  # UCX's descriptor may miss an event, and somebody must notice stalls


def settings(*, net_devices: str = "lo", rendezvous: str = "am") -> dict[str, str]:
    """What UCX must be told so that it never writes memory that is not ours to give.

    Args:
        net_devices: the devices that may carry data, e.g. "eth0" or "eth0,mlx5_0:1"; a worker can
            be reached by these alone. The default is this host only.
        rendezvous: how large messages travel. "am": in pieces that the receiver copies into place;
            "get_zcopy" where the network can read remote memory. Never a "put": a peer would write
            into blocks at a time of its own.
    """
    if rendezvous not in ("am", "get_zcopy"):
        raise ConfigError(f"the ucx transport has no rendezvous {rendezvous!r}: am or get_zcopy")
    return {
        "NET_DEVICES": net_devices,
        "TLS": "^sm,self",  # with shared memory a peer's kill -9 aborts the survivor
        "RNDV_SCHEME": rendezvous,
        # An eager message in several pieces is not ended by its endpoint's end, so there are none.
        "RNDV_THRESH": "48k",
        "TCP_TX_SEG_SIZE": "64k",
        "TCP_RX_SEG_SIZE": "128k",
    }


def why_unavailable() -> str | None:
    """One line that says why UCX cannot be used here; None if it can."""
    try:
        load()
    except ConfigError as error:
        return str(error)
    return None


def load() -> ModuleType:
    """The binding to UCX.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    try:
        from ucxx._lib import libucxx
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"the ucx transport is not available: {error}; pip install 'baton-serve[ucx]'"
        ) from error
    return libucxx  # type: ignore[no-any-return]


def array(buffer: Any) -> Any:
    """`buffer` as UCX takes it: the buffer protocol, or CUDA memory by its array interface.

    It keeps the buffer alive; a request does not, and must never outlive it.
    """
    return _array_type()(buffer)


@cache
def _array_type() -> Any:
    from ucxx._lib.arr import Array  # finding it costs as much as making one

    return Array


def new_context(values: Mapping[str, str]) -> Any:
    """A UCX context; its workers share it.

    Raises:
        ConfigError: UCX is not there, or refuses the settings.
    """
    ucx = load()
    try:
        return ucx.UCXContext(dict(values), (ucx.Feature.TAG, ucx.Feature.WAKEUP))
    except (ucx.UCXError, RuntimeError, OSError) as error:
        raise ConfigError(f"UCX does not start with {dict(values)}: {error}") from error


class DrivenWorker:
    """One UCX worker and the loop that drives it.

    Args:
        look: called whenever UCX may have done something; returns whether it gave UCX more to do.
        tick: called now and then.
    """

    def __init__(self, context: Any, look: Callable[[], bool], tick: Callable[[], None]) -> None:
        self._ucx = load()
        self._look = look
        self._tick = tick
        self._loop = asyncio.get_running_loop()
        self.worker: Any = self._ucx.UCXWorker(context)
        self.worker.init_blocking_progress_mode()
        self._fd = self.worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._turn)
        self._scheduled = False
        self._closed = False
        self._timer = self._loop.call_later(_TICK_S, self._on_timer)
        self.wake()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def address(self) -> bytes:
        """How others reach this worker."""
        return bytes(self.worker.address.tobytes())

    def connect(self, address: bytes) -> Any:
        """An endpoint to the worker at `address`, which must come from UCX: it is not checked.

        Raises:
            UCXError: no device leads there. Whether anybody is there shows in the sends.
        """
        return self.worker.create_endpoint_from_worker_address(
            self._ucx.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
        )

    def wake(self) -> None:
        """UCX was given something to do."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def probe(self, tag: int, mask: int = EVERY_BIT) -> tuple[int, int] | None:
        """Tag and length of the first message that waits for a receive."""
        found = self.worker.tag_probe(self._ucx.UCXXTag(tag), self._ucx.UCXXTagMask(mask))
        return (found.sender_tag.value, found.length) if found.matched else None

    def receive(self, into: Any, tag: int) -> Any:
        """Receive the first message with exactly this tag; a longer one is cut."""
        return self.worker.tag_recv(into, self._ucx.UCXXTag(tag))

    def send(self, endpoint: Any, data: Any, tag: int) -> Any:
        """Send one message; `data` must live until the request has completed."""
        return endpoint.tag_send(data, self._ucx.UCXXTag(tag))

    def close(self) -> None:
        """Drive no more. The caller has closed the endpoints before."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._look, self._tick = _nothing_to_do, _nothing  # they hold who holds this
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self.worker = None  # what UCX has open closes with the last endpoint and request

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        self._turn()

    def _turn(self) -> None:
        until = self._loop.time() + _TURN_S
        while not self._closed and self._loop.time() < until:
            self.worker.progress()
            busy = self._guarded_look()
            if self._closed or (not busy and self.worker.arm()):
                return
        self.wake()

    def _guarded_look(self) -> bool:
        try:
            return self._look()
        except Exception:  # a bug in a handler must not end the process
            log.exception("a message handler failed")
            return True

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._on_timer)
        self._tick()
        self.wake()


def _nothing_to_do() -> bool:
    return False


def _nothing() -> None: ...


def succeeded(request: Any) -> bool:
    """Whether a completed request did what it was for."""
    try:
        request.check_error()
    except (load().UCXError, RuntimeError):
        return False
    return True
