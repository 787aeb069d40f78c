"""Which transport a handoff takes: the first one here that the decode node has too and that works.

One that failed goes to the end of the line for a while: new handoffs take the next one meanwhile,
and it is tried again later, or at once where there is no other.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

from kvtransfer.transport import TransferStats, UnitSender
from wire.errors import TransferError
from wire.request_messages import Grant
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

Key = TypeVar("Key")
Value = TypeVar("Value")

_MAX_PEERS = 1024  # that are remembered


class TransportChoice:
    """Chooses for all handoffs of one prefill node.

    Args:
        senders: the transports of this node by name, the best one first.
        retry_s: how long one that failed is passed over.
    """

    def __init__(
        self,
        senders: Mapping[str, UnitSender],
        stats: TransferStats,
        *,
        retry_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._senders = senders
        self._stats = stats
        self._retry_s = retry_s
        self._clock = clock
        self._failed: OrderedDict[TransportAddress, float] = OrderedDict()  # at this time
        self._told: OrderedDict[NodeId, str] = OrderedDict()

    def choose(self, grant: Grant) -> TransportAddress:
        """Where the units of a new handoff go.

        Raises:
            TransferError: there is no common transport, or none that works.
        """
        theirs = {address.transport: address for address in grant.transports}
        common = [theirs[name] for name in self._senders if name in theirs]
        for address in sorted(common, key=self._is_failing):
            if self._reaches(address, grant.decode):
                self._tell(grant.decode, address.transport)
                return address
        raise TransferError(
            "transport",
            f"no common transport: {', '.join(self._senders)} here, {', '.join(theirs)} there",
        )

    def failed(self, address: TransportAddress, error: TransferError) -> None:
        """It took a unit and could not send it, or could not even connect."""
        log.warning("%s; new handoffs avoid %s", error, address.transport)
        self._stats.transport_failures[address.transport] += 1
        self._told.clear()
        _remember(self._failed, address, self._clock())

    def _reaches(self, address: TransportAddress, decode: NodeId) -> bool:
        try:
            return self._senders[address.transport].reaches(address.url, decode)
        except TransferError as error:
            self.failed(address, error)
            return False

    def _is_failing(self, address: TransportAddress) -> bool:
        failed_at = self._failed.get(address)
        return failed_at is not None and self._clock() < failed_at + self._retry_s

    def _tell(self, decode: NodeId, transport: str) -> None:
        """Say it once per peer, and again when it changes."""
        if self._told.get(decode) != transport:
            log.info("blocks go to %s by %s", decode, transport)
            _remember(self._told, decode, transport)


def _remember(what: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    what[key] = value
    what.move_to_end(key)
    while len(what) > _MAX_PEERS:
        what.popitem(last=False)
