"""What an engine is told when it is made; nothing changes it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine."""

    block_size: int = 16
    num_blocks: int = 1024
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    long_prefill_token_threshold: int = 0
    """Most tokens of one request per step; 0: as many as the budget has."""
    kv_overcommit: float = 1.0
    """Predicted growth may promise this many times the pool; above 1, requests can be preempted."""
    enable_prefix_caching: bool = True
    lookahead: bool = False
    """Launch the next step before the tokens of the present one are read (engine/lookahead.py)."""
    max_num_waiting: int = 4096
    """Requests beyond this many waiting ones are refused."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def num_blocks_for_beams(self, num_shared_tokens: int, num_tokens: int, width: int) -> int:
        """Most blocks of `width` rows of `num_tokens` slots that begin alike."""
        num_shared = num_shared_tokens // self.block_size
        return num_shared + width * (self.num_blocks_for(num_tokens) - num_shared)


_AT_LEAST_ONE = (
    "block_size",
    "num_blocks",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_waiting",
    "kv_overcommit",
)
