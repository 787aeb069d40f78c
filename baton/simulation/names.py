"""Names for the KV blocks of a trace's prompts, as the prefix cache uses them.

The cache asks only for equal names of equal prefixes. A trace says which prefixes are equal, so no
token has to be made up and hashed: an engine's block is named by the trace's block in which it
ends, all of those before it, and its own index.
"""

from __future__ import annotations

from struct import pack

from tuner.trace import TracedRequest
from wire.prefix import HASH_BYTES

_NAME = "<qq"
assert len(pack(_NAME, 0, 0)) == HASH_BYTES


class PrefixNames:
    """One run's names."""

    def __init__(self, block_size: int, trace_block_len: int) -> None:
        self._size = block_size
        self._trace_len = trace_block_len
        self._chains: dict[tuple[int, int], int] = {}  # (chain before, block id) → chain

    def of(self, index: int, request: TracedRequest) -> list[bytes]:
        """One name per full block of the prompt; what the trace does not name is its own."""
        own, num_blocks = -(index + 1), request.input_len // self._size
        chains = self._chain(request.block_ids)
        num_named = min(num_blocks, len(chains) * self._trace_len // self._size)
        names = []
        for block in range(num_named):
            place = ((block + 1) * self._size - 1) // self._trace_len
            names.append(pack(_NAME, chains[place], block))
        return names + [pack(_NAME, own, block) for block in range(num_named, num_blocks)]

    def _chain(self, block_ids: tuple[int, ...]) -> list[int]:
        found, before = [], -1
        for block_id in block_ids:
            before = self._chains.setdefault((before, block_id), len(self._chains))
            found.append(before)
        return found
