"""Windows of tokens: random ones from several streams to learn, consecutive ones to measure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Streams = dict[str, NDArray[np.uint16]]


@dataclass(frozen=True)
class Mixture:
    """Draws windows from several streams; the batch is a pure function of the step.

    So a resumed run sees what an uninterrupted one sees.
    """

    streams: Streams
    shares: Mapping[str, float]
    seed: int = 0

    def batch(self, step: int, rows: int, length: int) -> torch.Tensor:
        """`rows` windows of `length` + 1 tokens, so that every token has a successor."""
        rng = np.random.default_rng((self.seed, step))
        names = [name for name in self.shares if len(self.streams[name]) > length]
        weights = np.array([self.shares[name] for name in names])
        picks = rng.choice(len(names), size=rows, p=weights / weights.sum())
        picked = (self.streams[names[pick]] for pick in picks)
        return _stack([_window(s, int(rng.integers(len(s) - length)), length) for s in picked])


def consecutive_windows(stream: NDArray[np.uint16], length: int) -> torch.Tensor:
    """The whole stream as rows of `length` + 1 tokens; an incomplete last row is dropped."""
    count = (len(stream) - 1) // length
    return _stack([_window(stream, i * length, length) for i in range(count)])


def parts(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """The rows in groups of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _window(stream: NDArray[np.uint16], start: int, length: int) -> NDArray[np.uint16]:
    return stream[start : start + length + 1]


def _stack(rows: list[NDArray[np.uint16]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
