"""What decides a node's speed, in words: `baton profile` writes it, `baton plan` compares it."""

from __future__ import annotations

from collections.abc import Iterator

from node.machine import look


def device_text(device: str, threads: int, dtype: str) -> str:
    return f"{device}, {threads} threads, {dtype}"


def device_like(profiled: str) -> str:
    """`profiled` if this machine has such a processor, else the same on its CPU."""
    name, *rest = profiled.rsplit(", ", 2)
    return ", ".join([name if name in _processors() else look().cpu_model, *rest])


def _processors() -> Iterator[str]:
    """The CPU first: whoever asks only for that does not wait for torch."""
    yield look().cpu_model
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield torch.cuda.get_device_name(index)
