"""Gives memory back to the system while a model is loaded, so that its weights lie there once.

transformers maps the weight files and its tensors lie in the mapping. A weight that was packed is
not read again, yet its pages stay this process's as long as any tensor of the file lives, and the
embedding lives as long as the node.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Where this process's memory is a mapping of `files`; nowhere if the system does not tell."""

    def __init__(self, files: Iterable[Path], maps: Path = _MAPS) -> None:
        wanted = {str(file.resolve()) for file in files}
        self._spans = [span for span, path in _mappings(maps) if path in wanted]

    def give_up(self, tensors: Iterable[Tensor]) -> None:
        """Drop the resident pages of tensors that lie in the files; who reads them reads the file.

        Other tensors are left alone: their pages would become zeros. What was written into a
        mapped tensor is lost, so this is for tensors that nobody will read.
        """
        for tensor in tensors:
            begin = tensor.data_ptr()
            end = begin + tensor.numel() * tensor.element_size()
            if any(first <= begin and end <= last for first, last in self._spans):
                _drop_pages(begin, end)


def _mappings(maps: Path) -> Iterator[tuple[tuple[int, int], str]]:
    """[begin, end) and path of every mapping."""
    if not maps.is_file():
        return
    for line in maps.read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        begin, end = span.split("-")
        yield (int(begin, 16), int(end, 16)), path


def _drop_pages(begin: int, end: int) -> None:
    """Only whole pages: neighbours share the ones at the borders."""
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def trim() -> None:
    """Give freed memory that the allocator keeps back to the system, where it can (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
