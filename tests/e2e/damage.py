"""Mischief with what travels between nodes, and blindness to it (see mischief.py).

Damage is done at the seams that every transport has: a sender's `send`, and the landing that a
receiver writes into. Blindness switches off one check in the decode node's process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.request import Request
from engine.sampler import Sampler
from kvtransfer.digest import UnitSealer
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.sender import KVSender
from kvtransfer.transport import Landing
from node.build import BuiltEngine
from node.token_outbox import TokenOutbox
from tests.e2e.mischief import Call, Inside, mischief
from wire import codec
from wire.handoff_messages import Commit, UnitHeader
from wire.messages import Message
from wire.request_messages import Grant
from wire.types import AttemptId, NodeId


class _Tampered:
    """A landing whose bytes are damaged on the way: before anybody has verified them."""

    def __init__(self, landing: Landing, damage: Callable[[memoryview], None]) -> None:
        self.view = landing.view
        self._landing = landing
        self._damage = damage
        self._damaged = False

    def fill(self, data: memoryview) -> None:
        copy = memoryview(bytearray(data))
        self._damage(copy)
        self._damaged = True
        self._landing.fill(copy)

    def end(self, num_bytes: int) -> None:
        if not self._damaged:
            self._damage(self.view)
        self._landing.end(num_bytes)


# ---------------------------------------------------------------- damage


@mischief
def flip_bit(inside: Inside, *, token: int, byte: int, bit: int, times: int) -> None:
    """Decode node: a bit of the unit that holds a token flips once its transport has placed it."""
    left = times

    def flip(data: memoryview) -> None:
        data[byte] ^= 1 << bit
        inside.done.append(f"flipped bit {bit} of byte {byte}")

    def begin(
        original: Call, receiver: Any, sender: NodeId, header: UnitHeader, num_units: int = 1
    ) -> Any:
        nonlocal left
        landing = original(receiver, sender, header, num_units)
        if landing is None or not left or not header.token_start <= token < header.token_end:
            return landing
        left -= 1
        return _Tampered(landing, flip)

    inside.wrap(KVReceiver, "begin", begin)


@mischief
def truncate(inside: Inside, *, token: int, times: int) -> None:
    """Prefill node: only the first quarter of the unit that holds a token is sent."""
    left = times

    def send(original: Call, sender: Any, url: Any, to: Any, header: UnitHeader, *rest: Any) -> Any:
        nonlocal left
        payload, on_done = rest
        if header.token_start <= token < header.token_end and left:
            left -= 1
            size = header.num_bytes // 4
            header, payload = replace(header, num_bytes=size), payload[:size]
            inside.done.append(f"sent {size} bytes of unit {header.unit}")
        original(sender, url, to, header, payload, on_done)

    _wrap_senders(inside, send)


@mischief
def reuse_sources(inside: Inside) -> None:
    """Prefill node: when the second request's units leave, their memory holds the first one's.

    As if a block were given out again while a zero-copy send still has to read it.
    """
    earlier: dict[int, bytes] = {}
    leases: list[int] = []

    def send(original: Call, sender: Any, url: Any, to: Any, header: UnitHeader, *rest: Any) -> Any:
        payload, on_done = rest
        if header.lease not in leases:
            leases.append(header.lease)
        if header.lease == leases[0]:
            earlier[header.unit] = bytes(payload)
        elif header.lease == leases[1]:
            on_done = _overwrite(payload, earlier[header.unit], on_done)
            inside.done.append(f"overwrote unit {header.unit}")
        original(sender, url, to, header, payload, on_done)

    _wrap_senders(inside, send)


def _overwrite(memory: memoryview, content: bytes, then: Callable[[], None]) -> Callable[[], None]:
    """Returns what puts the true content back and goes on with `then`."""
    truth = bytes(memory)
    memory[:] = content

    def restore() -> None:
        memory[:] = truth
        then()

    return restore


@mischief
def swap_blocks(inside: Inside) -> None:
    """Prefill node: the units of two requests travel under each other's headers."""
    held: dict[int, tuple[UnitHeader, memoryview, Any]] = {}
    leases: list[int] = []

    def send(original: Call, sender: Any, url: Any, to: Any, header: UnitHeader, *rest: Any) -> Any:
        if header.lease not in leases:
            leases.append(header.lease)
        if header.lease not in leases[:2]:
            original(sender, url, to, header, *rest)
        elif header.unit not in held:
            held[header.unit] = (header, *rest)
        else:
            other, *other_rest = held.pop(header.unit)
            original(sender, url, to, header, *other_rest)
            original(sender, url, to, other, *rest)
            inside.done.append(f"swapped unit {header.unit}")

    _wrap_senders(inside, send)


def _wrap_senders(inside: Inside, send: Call) -> None:
    for sender in inside.role._transports.values():
        inside.wrap(type(sender), "send", send)


@mischief
def repeat_commits(inside: Inside) -> None:
    """Prefill node: every commit is said three times, and once more with the next request's."""
    said: list[tuple[Grant, Message]] = []

    def send(original: Call, grant: Grant, message: Message) -> None:
        original(grant, message)
        if isinstance(message, Commit):
            for _ in range(2):
                original(grant, message)
            for earlier in said:
                original(*earlier)
            said.append((grant, message))
            inside.done.append(f"repeated the commit of lease {grant.lease}")

    inside.wrap(inside.role._sender, "_send", send)


@mischief
def withhold_first_tokens(inside: Inside) -> None:
    """Prefill node: all units of a request leave; its first token goes to nobody, so no commit."""

    def drop(original: Call, owner: Any, id: AttemptId, *args: Any) -> None:
        if id.attempt == 1:
            inside.done.append(f"withheld the first token of {id}")
        else:
            original(owner, id, *args)

    inside.wrap(KVSender, "first_token", drop)
    inside.wrap(TokenOutbox, "add", drop)


@mischief
def claim_lease(inside: Inside, *, lease: int) -> None:
    """Prefill node: its next commit names a lease that is somebody else's."""

    def send(original: Call, grant: Grant, message: Message) -> None:
        if isinstance(message, Commit) and not inside.done:
            inside.done.append(f"{message.id} claimed lease {lease}")
            message = replace(message, lease=lease)
        original(grant, message)

    inside.wrap(inside.role._sender, "_send", send)


@mischief
def claim_layout(inside: Inside, *, head_dim: int) -> None:
    """Either role, from its start: it registers with another layout than it has."""
    layout = property(lambda built: replace(built.memory.layout, head_dim=head_dim))
    inside.replace(BuiltEngine, "layout", layout)


@mischief
def speak(inside: Inside, *, version: int) -> None:
    """Either role, from its start: it speaks another version of the protocol."""
    inside.replace(codec, "PROTOCOL_VERSION", version)


@mischief
def poison(inside: Inside, *, max_tokens: int) -> None:
    """Decode node: the logits of requests with this `max_tokens` are not numbers."""

    def draw(
        original: Call, sampler: Any, logits: Tensor, requests: Sequence[Request], *others: Any
    ) -> Any:
        logits = logits.clone()
        for row, request in enumerate(requests):
            if request.sampling.max_tokens == max_tokens:
                logits[row] = torch.nan
                inside.done.append(f"poisoned {request.request_id}")
        return original(sampler, logits, requests, *others)

    inside.wrap(Sampler, "draw", draw)


# ---------------------------------------------------------------- blindness, for the controls


class _Agreeable(bytes):
    """A digest that no other differs from."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


@mischief
def trust_digests(inside: Inside) -> None:
    """Decode node: no digest is compared."""
    inside.wrap(UnitSealer, "seal", lambda original, *args: _Agreeable(original(*args)))


@mischief
def trust_lengths(inside: Inside) -> None:
    """Decode node: what arrives is taken for whole."""

    def begin(
        original: Call, receiver: Any, sender: NodeId, header: UnitHeader, num_units: int = 1
    ) -> Any:
        landing = original(receiver, sender, header, num_units)
        return _Long(landing) if landing is not None else None

    inside.wrap(KVReceiver, "begin", begin)


class _Long:
    """A landing that does not hear how much came."""

    def __init__(self, landing: Landing) -> None:
        self.view = landing.view
        self.fill = landing.fill
        self._end = landing.end

    def end(self, num_bytes: int) -> None:
        self._end(len(self.view))


@mischief
def trust_claims(inside: Inside) -> None:
    """Decode node: who names a lease is believed to be the one who has it."""

    def commit(original: Call, table: Any, message: Commit, sender: NodeId, now: float) -> Any:
        if lease := table._leases.get(message.lease):
            message = replace(message, id=lease.id, capability=lease.capability)
            sender = lease.sender
        return original(table, message, sender, now)

    inside.wrap(LeaseTable, "commit", commit)


@mischief
def trust_late_units(inside: Inside) -> None:
    """Decode node: a unit is placed where it says, whoever has the block by now."""

    def begin(
        original: Call, receiver: Any, sender: NodeId, header: UnitHeader, num_units: int = 1
    ) -> Any:
        landing = original(receiver, sender, header, num_units)
        if landing is None:
            inside.done.append(
                f"placed unit {header.unit} of lease {header.lease}, which had ended"
            )
            return _Late(receiver._memory.block_bytes(header.handle.block_id))
        return landing

    inside.wrap(KVReceiver, "begin", begin)


class _Late:
    """A landing that nobody accounts for."""

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def fill(self, data: memoryview) -> None:
        self.view[: len(data)] = data

    def end(self, num_bytes: int) -> None:
        """The damage is done."""
