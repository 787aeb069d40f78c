"""The flags of a fleet on this machine: what they ask for, and what of it each process is told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.bundled_model import DEFAULT_MODEL
from baton.config import visible_gpus
from baton.model_report import report_on
from engine.drafting.config import parse_speculative_config
from node import machine
from node.devices import is_gpu, num_gpus, resolve_device, spread
from node.flags import add_decode_arguments, add_engine_arguments
from wire.errors import ConfigError

AddArguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to keep alive."""

    name: str
    role: str


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, by how many nodes, and how these run."""
    parser.add_argument(
        "model",
        nargs="?",
        default=str(DEFAULT_MODEL),
        metavar="MODEL",
        help="folder of a Hugging Face model (the bundled one)",
    )
    fleet = parser.add_argument_group("fleet")
    for role in ("prefill", "decode"):
        fleet.add_argument(
            f"--{role}",
            type=_count,
            metavar="N",
            help=f"{role} nodes (1; 0 where there are mixed nodes)",
        )
    fleet.add_argument(
        "--mixed",
        type=_count,
        default=0,
        metavar="N",
        help="nodes that serve requests alone, from prompt to end, and beside others do both (0)",
    )
    fleet.add_argument(
        "--flex",
        type=_count,
        default=0,
        metavar="N",
        help="nodes besides, beginning as decode, prefill, decode, …, whose names promise no "
        "role: --tune and POST /admin/role move them, as they do all others (0)",
    )
    add_engine_arguments(parser)
    add_decode_arguments(parser)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("at least 0")
    return number


def check_model(args: argparse.Namespace) -> None:
    """Raises ConfigError before any process is started in vain; sizes the KV pools."""
    if not Path(args.model).is_dir():
        raise ConfigError(f"there is no model folder {args.model!r}")
    parse_speculative_config(args.speculative_config)
    if not any(spec.role != "prefill" for spec in node_specs(args)):
        raise ConfigError("no node would answer requests: give --decode, --mixed or --flex")
    if args.device == "auto" and is_gpu(resolve_device("auto")):
        args.device = "cpu" if visible_gpus() == 0 else "cuda"
    if is_gpu(args.device):
        return  # each node measures what it can take
    args.kv_memory = args.kv_memory or _kv_memory(args)


def _kv_memory(args: argparse.Namespace) -> int:
    """Each node's KV pool where the operator named none; 0: each node decides, or refuses.

    Weights in float32 are each node's own; others lie in the files' pages, which nodes share.
    """
    found = machine.look()
    bf16 = found.has_bf16_units if args.dtype == "auto" else args.dtype != "float32"
    report = report_on(Path(args.model), has_bf16_units=bf16)
    available = found.available_bytes or machine.UNKNOWN_MEMORY
    num_nodes, weight_bytes = len(node_specs(args)), report["weight_bytes_in_memory"]
    needed = num_nodes * (weight_bytes + machine.WORK_BYTES)
    if report["dtype"] == "float32" and needed > available:
        raise ConfigError(
            f"too little memory: {num_nodes} nodes need {machine.size(needed)} (each weights of "
            f"{machine.size(weight_bytes)} in float32 and {machine.size(machine.WORK_BYTES)} to "
            f"work), available {machine.size(available)}; start fewer nodes, "
            "set --dtype bfloat16, or take a smaller model"
        )
    return machine.kv_memory_of_each(num_nodes, weight_bytes, available)


def node_counts(args: argparse.Namespace) -> dict[str, int]:
    """How many nodes of each kind the flags ask for."""
    other = 0 if args.mixed else 1
    return {
        "prefill": other if args.prefill is None else args.prefill,
        "decode": other if args.decode is None else args.decode,
        "mixed": args.mixed,
        "flex": args.flex,
    }


def node_specs(args: argparse.Namespace) -> list[NodeSpec]:
    """The nodes that the flags ask for; `role` is the one that a node begins with."""
    flex = ("decode", "prefill")
    return [
        NodeSpec(f"{kind}-{i}", flex[i % 2] if kind == "flex" else kind)
        for kind, count in node_counts(args).items()
        for i in range(count)
    ]


def tuner_notice(args: argparse.Namespace) -> str | None:
    """What to say where the tuner could move nothing: more nodes may come, so it is no error."""
    movable = sum(spec.role != "mixed" for spec in node_specs(args))
    if args.tune == "off" or movable > 2:
        return None
    return (
        f"--tune {args.tune} has nothing to move: each role keeps its last node, and mixed nodes "
        "are left alone; give more nodes with --prefill, --decode or --flex"
    )


def on_its_device(args: argparse.Namespace, number: int, num_devices: int) -> argparse.Namespace:
    """The flags of the `number`-th node: on GPUs it has one, and its share of that one's memory."""
    if not is_gpu(args.device):
        return args
    devices = [spread(args.device, n, num_devices) for n in range(len(node_specs(args)))]
    device = devices[number]
    share = args.gpu_memory_utilization / devices.count(device)
    return argparse.Namespace(
        **vars(args) | {"device": device, "gpu_memory_utilization": round(share, 4)}
    )


def count_gpus() -> int:
    """GPUs that this process's children see."""
    visible = visible_gpus()
    return num_gpus() if visible is None else visible


def given_flags(add_arguments: AddArguments, args: argparse.Namespace) -> list[str]:
    """The flags among those of `add_arguments` that the operator gave, as a child takes them."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    flags: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value == action.default:
            continue
        flag = action.option_strings[-1]
        if isinstance(action, argparse.BooleanOptionalAction) and value:
            flag = action.option_strings[0]
        if isinstance(action, argparse._AppendAction):
            flags.extend(f"{flag}={item}" for item in value)
            continue
        flags.append(flag)
        if action.nargs != 0:
            flags.extend(map(str, value) if isinstance(value, list | tuple) else [str(value)])
    return flags
