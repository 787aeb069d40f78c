"""What one choice of a request asks of the nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from wire.prefix import block_hashes, root_hash
from wire.types import Pooling, SamplingParams


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt's tokens, shared by all its choices, and the names of its blocks."""

    tokens: tuple[int, ...]
    cache_salt: str = ""
    _hashes: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)

    def block_hashes(self, model_fingerprint: str, block_size: int) -> list[bytes]:
        """One hash per full block (a node's prefix cache knows blocks by them)."""
        key = (model_fingerprint, block_size)
        if key not in self._hashes:
            root = root_hash(model_fingerprint, self.cache_salt)
            self._hashes[key] = block_hashes(self.tokens, block_size, root)
        return self._hashes[key]


@dataclass(frozen=True, slots=True)
class Work:
    """One choice: its id on the wire, the prompt, and how to sample."""

    request: str
    prompt: Prompt
    sampling: SamplingParams
    pooling: Pooling | None = None  # an embedding is wanted, and no token

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.tokens)

    @property
    def max_num_tokens(self) -> int:
        beam = self.sampling.beam
        return self.num_tokens + self.sampling.max_tokens * (1 if beam is None else beam.width)

    def block_hashes(self, model_fingerprint: str, block_size: int) -> list[bytes]:
        return self.prompt.block_hashes(model_fingerprint, block_size)
