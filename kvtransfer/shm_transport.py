"""Units between two processes of one host: the decode node copies them out of the other's pool.

    prefill node                                decode node
    pool ─────── descriptor, read-only ───────▶ maps it                  once per connection
    unit ─────── header and its place ────────▶ lease? copy into its block
    on_done ◀─── so many more are over ──────── or not, and drop it

One copy, made by the owner of the block under its lease; nobody can write another's memory. A unit
that does not lie in the pool (the filled part of a last block) travels inline behind its header.

A lost connection ends all sends on it, though the decode node may be copying at that very moment:
it can damage nothing here, and if the block is reused under its eyes it gets other bytes than were
sealed when the block was computed. Its digest is of its own copy: what it verified is what it has.

The socket is an abstract one and the pool has no name, so nothing is left after kill -9.
"""

from __future__ import annotations

from kvtransfer.shm_receiver import ShmUnitReceiver
from kvtransfer.shm_sender import ShmUnitSender

__all__ = ["NAME", "ShmUnitReceiver", "ShmUnitSender"]

NAME = "shm"
