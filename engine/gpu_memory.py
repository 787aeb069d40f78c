"""How many bytes of a GPU the KV pool gets.

    |<------------------------------ total ------------------------------->|
    |<---------------- total * utilization ---------------->|
    | weights | other | largest step | graphs, copies | KV pool | left to others

`other` is what driver, libraries and fragments take beside the tensors. What other processes hold
counts only where the share would not fit beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.errors import ConfigError

MARGIN = 64 << 20  # of what is free: allocations come in pieces


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What was measured once the model was loaded and its largest step was tried, in bytes."""

    device: str
    total: int
    free_at_start: int  # before this process took anything
    free: int  # now; the largest step's memory is kept, so it is not in here
    weights: int
    other: int
    step: int
    graphs: int = 0  # not taken yet, as the next one
    copies: int = 0  # scratch of handoffs

    @property
    def own(self) -> int:
        """All that this process takes besides the pool."""
        return self.weights + self.other + self.step + self.graphs + self.copies

    def told(self, utilization: float) -> str:
        """The numbers of an error."""
        return (
            f"{self.device} has {gib(self.total)}, {gib(self.free_at_start)} of it free at start; "
            f"--gpu-memory-utilization {utilization:g} allows "
            f"{gib(int(self.total * utilization))}; weights {gib(self.weights)}, "
            f"largest step {gib(self.step)}, graphs {gib(self.graphs)}, "
            f"copies {gib(self.copies)}, other {gib(self.other)}"
        )


def pool_bytes(use: GpuUse, utilization: float, needed: int, wanted: int = 0) -> int:
    """Bytes for the KV pool. Raises ConfigError with the numbers and what to set.

    Args:
        needed: of the smallest pool that is of any use.
        wanted: by the operator; 0: as many as there are.
    """
    share = int(use.total * utilization) - use.own
    room = use.free - use.graphs - use.copies - MARGIN
    if wanted and wanted > room:
        raise ConfigError(
            f"too little GPU memory: --kv-cache-memory {gib(wanted)} is more than the "
            f"{gib(max(0, room))} that are left; {use.told(utilization)}"
        )
    size = wanted or min(share, room)
    if size >= needed:
        return size
    if wanted:
        remedy = f"set --kv-cache-memory to at least {-(-needed >> 20)}M"
    elif share < needed and room >= needed:
        remedy = "raise --gpu-memory-utilization, or lower --max-num-batched-tokens"
    else:
        remedy = "end what else runs there, lower --max-num-batched-tokens, take a smaller model"
    raise ConfigError(
        f"too little GPU memory: {gib(max(0, size))} left for KV, at least {gib(needed)} needed; "
        f"{use.told(utilization)}; {remedy}"
    )


def check_weights(device: str, weights: int, total: int, free: int, utilization: float) -> None:
    """Refuse a model that cannot fit, before its weights are read."""
    allowed = min(free, int(total * utilization))
    if weights > allowed:
        raise ConfigError(
            f"too little GPU memory: weights {gib(weights)}; {device} has {gib(total)}, "
            f"{gib(free)} of it free, and --gpu-memory-utilization {utilization:g} allows "
            f"{gib(int(total * utilization))}; take a smaller model, another --device, "
            "or --device cpu"
        )


def gib(num_bytes: int) -> str:
    """`"1.5 GiB"`."""
    return f"{num_bytes / (1 << 30):.2f} GiB"
