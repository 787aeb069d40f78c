"""What decides the bits of a result, and which dtype suits this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from wire.errors import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm


def resolve_dtype(
    requested: str, checkpoint: torch.dtype, *, device: str, has_bf16_units: bool
) -> torch.dtype:
    """The dtype to compute in. `auto` keeps the checkpoint's where the machine is fast at it.

    A GPU is slow at float32 and has no memory to spare for it: there it becomes one of 16 bits.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise ConfigError(f"dtype {requested!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[requested]
    if device != "cpu":
        half = torch.bfloat16 if has_bf16_units else torch.float16
        return torch.float16 if checkpoint == torch.float16 else half
    if not (checkpoint == torch.bfloat16 and has_bf16_units):
        return torch.float32
    return checkpoint


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 itself; emulated, it is three times slower than fp32."""
    return not BF16_FLAGS.isdisjoint(_cpu_info()["flags"].split())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def numerics_fingerprint(*, dtype: torch.dtype, device: str, kernels: str = "torch") -> str:
    """Names what decides bits: nodes with the same text compute equal logits for equal batches.

    Covers processor model, instruction set, torch build, threads, dtype and kernels.
    """
    if device.startswith("cuda"):
        hardware = [torch.cuda.get_device_name(device), f"cuda{torch.version.cuda}"]
    else:
        hardware = [_cpu_info()["model"], torch.backends.cpu.get_cpu_capability()]
        hardware.append(f"threads{torch.get_num_threads()}")
    parts = [*hardware, f"torch{torch.__version__}", dtype_name(dtype), kernels]
    return "/".join(parts).replace(" ", "_")


def _cpu_info() -> dict[str, str]:
    """Model and flags of the first processor; empty flags where the system does not tell."""
    info = {"model": platform.processor() or platform.machine(), "flags": ""}
    names = {"model name": "model", "flags": "flags", "Features": "flags"}
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return info
    for line in lines:
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in names:
            info[names[name]] = value
    return info
