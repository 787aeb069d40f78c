"""`baton doctor`: what this machine has, and what Baton would choose on it.

Reads files and package metadata only, so that it starts at once; torch is loaded (seconds) only
where an accelerator's device file says that there is something to ask it about.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.model_report import choose_dtype, report_on, report_on_loaded
from kvtransfer.ucx_devices import has_rdma_hardware
from node import machine
from node.devices import is_gpu, num_gpus, parse_device, resolve_device
from node.machine import size
from wire.errors import ConfigError

PACKAGES = (
    *("torch", "transformers", "safetensors", "tokenizers", "numpy", "triton"),
    *("aiohttp", "msgpack", "pydantic", "pyzmq", "prometheus-client", "jinja2", "xxhash"),
)
UCX_PACKAGES = ("ucxx-cu12", "ucxx-cu13", "ucxx")  # one library under three names
LIBUCX_PACKAGES = ("libucx-cu12", "libucx-cu13")
TRANSPORTS = {
    "loopback": (),
    "zmq": ("pyzmq",),
    "shm": (),
    "ucx": UCX_PACKAGES,
    "cuda-ipc": (),
}

ISA_FLAGS = {  # as kernels/cpu_ops.cpp chooses
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx2": {"avx2", "fma"},
}

Section = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton doctor`."""
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="folder of a model to look at as well"
    )
    parser.add_argument(
        "--load",
        action="store_true",
        help="load the model as a node does: what is fused, whether it is deterministic (seconds)",
    )
    parser.add_argument(
        "--device",
        type=parse_device,
        default="auto",
        metavar="NAME",
        help="where MODEL would run: auto, cpu, cuda or cuda:N (auto, as a node chooses)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if nothing speaks against serving, else 1."""
    if args.load and args.model is None:
        raise ConfigError("--load needs a MODEL")
    findings = examine(args.model, load=args.load, device=resolve_device(args.device))
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _print(findings)
    return 1 if findings["problems"] else 0


def examine(model: Path | None, *, load: bool = False, device: str = "cpu") -> dict[str, Any]:
    """All findings by section, and a list of what is wrong."""
    found = machine.look()
    versions = {name: version_of(name) for name in PACKAGES}
    findings: dict[str, Any] = {
        "machine": machine_section(found),
        "software": {"python": platform.python_version(), "baton-serve": version_of("baton-serve")},
        "transports": {name: transport_state(name) for name in TRANSPORTS},
        "cpu_kernels": {"state": kernels_state(found.cpu_flags)},
        "choices": choices_section(found, device),
    }
    findings["software"] |= versions | {"ucxx": _ucxx_version()}
    problems = list(_problems(versions))
    if model is not None:
        try:
            findings["model"] = report_on(model, has_bf16_units=found.has_bf16_units, device=device)
            if load:
                findings["model"] |= report_on_loaded(model, device)
        except ConfigError as error:
            problems.append(str(error))
    return findings | {"problems": problems}


def machine_section(found: machine.Machine) -> Section:
    """Hardware and the limits of this process."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": found.cpu_model,
        "usable_cores": found.num_cores,
        "instruction_sets": found.shown_flags,
        "bf16_units": found.has_bf16_units,
        "memory_bytes": found.memory_bytes,
        "available_bytes": found.available_bytes,
        "shared_memory_bytes": _free_bytes(Path("/dev/shm")),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "gpus": _gpus() if found.accelerator_devices else [],
    }


def choices_section(found: machine.Machine, device: str = "cpu") -> Section:
    """What `baton serve` does here without flags, or on `device`."""
    units = found.has_bf16_units
    return {
        "device": device,
        "dtype_of_bfloat16_models": choose_dtype("bfloat16", has_bf16_units=units, device=device),
        "dtype_of_other_models": choose_dtype("float32", has_bf16_units=units, device=device),
        "nodes": "1 prefill, 1 decode",
        "threads_per_node": max(1, found.num_cores // 2),
        "transport": "auto: cuda-ipc between GPUs of one host, shm on one host; between hosts ucx "
        "where UCX has RDMA, else zmq",
        **(
            {"kv_memory_of_a_gpu": "90 % of it in all, shared by its nodes, less weights and work"}
            if is_gpu(device)
            else {"kv_memory_bytes_per_node": machine.default_kv_memory()}
        ),
    }


def transport_state(name: str) -> str:
    """Whether a KV transport can be used: its module and the package that it needs are here."""
    module_name = name.replace("-", "_")
    modules = [f"kvtransfer.{module_name}{end}" for end in ("_transport", "_lane", "")]
    if not any(util.find_spec(module) for module in modules):
        return "not built in yet"
    packages = TRANSPORTS[name]
    if packages and not any(version_of(package) for package in packages):
        return f"needs the package {packages[0]}"
    if name == "cuda-ipc" and not num_gpus():
        return "needs an NVIDIA GPU"
    if name == "ucx":
        return f"ready: {_ucx_parts()}"
    return "ready, inside one process" if name == "loopback" else "ready"


def kernels_state(cpu_flags: frozenset[str], folder: Path | None = None) -> str:
    """Whether the compiled CPU kernels are there, by their files; torch stands in for them."""
    folder = folder or Path(__file__).resolve().parents[1] / "kernels"
    built = [path for end in EXTENSION_SUFFIXES if (path := folder / f"_cpu_ops{end}").is_file()]
    again = "run `pip install` for Baton again"
    if not built:
        compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        needed = f"{compilers[0]} is here" if compilers else "install a C++ compiler (g++)"
        return f"not built, torch does their work slower and not bit-stable: {needed}, {again}"
    sources = [folder / name for name in ("cpu_ops.cpp", "cpu_ops.inc", "cpu_linear.inc")]
    newest = max((source.stat().st_mtime for source in sources if source.is_file()), default=0.0)
    if newest > built[0].stat().st_mtime:
        return f"built, but older than their source: {again}"
    isa = next((isa for isa, flags in ISA_FLAGS.items() if flags <= cpu_flags), "plain")
    return f"built, {isa}"


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _ucx_parts(sys_class: Path = Path("/sys/class")) -> str:
    """What the installed UCX is built with, from its files: loading it takes half a second."""
    spec = util.find_spec("libucx")
    if spec is None or spec.origin is None:
        return "UCX of the system, which `ucx_info -d` tells about"
    folder = Path(spec.origin).parent / "lib" / "ucx"
    parts = {"CUDA": "libuct_cuda.so", "RDMA": "libuct_ib.so"}
    has = {part: any(folder.glob(f"{file}*")) for part, file in parts.items()}
    version = next(filter(None, map(version_of, LIBUCX_PACKAGES)), "")
    built = ", ".join(f"{part} {'built in' if there else 'not'}" for part, there in has.items())
    hardware = "RDMA hardware" if has_rdma_hardware(sys_class) else "no RDMA hardware"
    advice = "" if has["RDMA"] else "; only TCP then, where zmq is faster"
    return f"UCX {version}, {built}, {hardware}{advice}"


def _ucxx_version() -> str | None:
    return next((version for name in UCX_PACKAGES if (version := version_of(name))), None)


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _gpus() -> list[str]:
    """Names of the accelerators that torch sees."""
    print("an accelerator's device file is here; loading torch to ask about it", file=sys.stderr)
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _problems(versions: dict[str, str | None]) -> Iterator[str]:
    """What would keep Baton from working, one line each."""
    for name, version in versions.items():
        if version is None:
            yield f"the package {name} is not installed"
    if version_of("kernels"):
        yield "the package `kernels` is installed; it hides Baton's folder of that name"
    if os.name != "posix":
        yield f"{platform.system()} is not supported"


def _print(findings: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, section in findings.items():
        if title == "problems":
            continue
        table.add_row(f"[bold]{title}[/bold]")
        for name, value in section.items():
            table.add_row(f"  {_label(name)}", _text(name, value))
    console.print(table)
    for problem in findings["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if not findings["problems"]:
        console.print("no problems found")


def _label(name: str) -> str:
    return name.replace("_bytes", "").replace("_", " ")


def _text(name: str, value: Any) -> str:
    """A value as a person reads it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return size(value) if "_bytes" in name else str(value)
