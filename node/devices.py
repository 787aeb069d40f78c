"""Which device a node computes on, decided from files: torch takes seconds to load.

    cpu        always there
    cuda:N     the N-th NVIDIA device, as torch counts them

`auto` is the first NVIDIA device where the system has one and torch is built for CUDA, else the
CPU. What torch then makes of a device is found when the model is loaded.
"""

from __future__ import annotations

import argparse
import re
from importlib import util
from pathlib import Path

from node.machine import ROOT

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_NUMBERED = re.compile(r"nvidia\d+")  # nvidiactl and nvidia-uvm are no devices
_CUDA_BUILD = re.compile(r"^cuda\b[^=\n]*=\s*['\"]", re.MULTILINE)


def parse_device(text: str) -> str:
    """What `--device` takes."""
    if _DEVICE.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto, cpu, cuda nor cuda:N")


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def gpu_index(device: str) -> int:
    """N of `cuda:N`."""
    return int(device.partition(":")[2] or 0)


def resolve_device(requested: str, root: Path = ROOT, *, torch_has_cuda: bool | None = None) -> str:
    """`cpu` or `cuda:N`.

    Args:
        torch_has_cuda: of the torch that will be loaded; None: look.
    """
    if requested == "cuda":
        return "cuda:0"
    if requested != "auto":
        return requested
    if not num_gpus(root):
        return "cpu"
    usable = is_cuda_build() if torch_has_cuda is None else torch_has_cuda
    return "cuda:0" if usable else "cpu"


def spread(device: str, number: int, num_devices: int) -> str:
    """The device of the `number`-th of several nodes: they take turns where none was named."""
    if not is_gpu(device) or device.partition(":")[2]:
        return device
    return f"cuda:{number % max(1, num_devices)}"


def num_gpus(root: Path = ROOT) -> int:
    """How many NVIDIA devices the system shows."""
    folder = root / "dev"
    if (root / "dev/dxg").exists():  # Windows' subsystem for Linux shows all as one
        return 1
    return sum(bool(_NUMBERED.fullmatch(p.name)) for p in folder.glob("nvidia*"))


def is_cuda_build(version_file: Path | None = None) -> bool:
    """Whether the installed torch is built for CUDA, by its version file."""
    spec = None if version_file else util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        version_file = Path(spec.origin).parent / "version.py"
    if version_file is None or not version_file.is_file():
        return False
    return _CUDA_BUILD.search(version_file.read_text()) is not None
