"""The few things that only a CUDA device has: whether it is usable, its memory, its errors.

Everything here works on a machine without one; `torch.cuda` is asked only for a `cuda:` device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wire.errors import ConfigError

_BROKEN = (
    *("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cudaError", "device-side assert"),
    "Triton Error [CUDA]",
)
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_gpu(device: str | torch.device) -> bool:
    return str(device).startswith("cuda")


def check_device(device: str) -> None:
    """Raises ConfigError where torch cannot use it, in one line."""
    if not is_gpu(device):
        return
    index = torch.device(device).index or 0
    if not torch.cuda.is_available():
        why = f"torch {torch.__version__} is built without CUDA" if not torch.version.cuda else ""
        why = why or "torch finds no CUDA device; is the driver installed and new enough?"
        raise ConfigError(f"--device {device}: {why} (--device cpu computes without one)")
    if index >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
    try:
        torch.cuda.mem_get_info(index)  # the first call that needs the device itself
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise ConfigError(f"--device {device} cannot be used: {line}") from error


def has_bf16(device: str) -> bool:
    """Whether a GPU multiplies bf16 itself: those since Ampere do."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def use_device(device: str) -> None:
    """Make it this thread's own: events and kernels without a tensor's device go there."""
    if is_gpu(device):
        torch.cuda.set_device(device)


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """A device's memory at one moment, in bytes."""

    total: int
    free: int  # for any process
    reserved: int  # by this process's tensors, kept ones included


def memory_now(device: str) -> MemoryNow:
    """Of a CUDA device."""
    free, total = torch.cuda.mem_get_info(device)
    return MemoryNow(total, free, torch.cuda.memory_reserved(device))


def tensor_at(address: int, num_bytes: int, device: str | torch.device) -> torch.Tensor:
    """uint8 [num_bytes] over memory of a CUDA device that torch has not made."""
    return torch.as_tensor(_Memory(address, num_bytes), device=torch.device(device))


class _Memory:
    """What numba and all others who share memory of a GPU agreed on."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # not read-only
            "version": 3,
        }


def synchronize(device: torch.device) -> None:
    """Wait until this thread's stream is empty; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the numbers; on a GPU the host does not wait until they are there."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def give_back_memory() -> None:
    """Cached memory that no tensor has goes back to the device, so that other sizes find room."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the step can be tried again with less in it.

    Beside torch's allocator there are drivers and libraries that ask for memory.
    """
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in _FULL)


def is_broken(error: BaseException) -> bool:
    """Whether the device is lost for this process: after such an error every call fails."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(m in str(error) for m in _BROKEN)


def first_line(error: BaseException) -> str:
    """CUDA's errors go on with advice for developers."""
    return str(error).partition("\n")[0] or type(error).__name__
