"""What an engine is told when it is made; nothing changes it afterwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine."""

    block_size: int = 16
    num_blocks: int = 1024
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_overcommit: float = 1.0
    """Predicted growth may promise this many times the pool; above 1, requests can be preempted."""
    enable_prefix_caching: bool = True
