"""`baton serve`: a router and nodes of each role as processes on this machine.

start      router first (the nodes register with it), then all nodes at once
supervise  a node that dies is reported and started again; the router's end is everybody's
stop       on Ctrl-C or SIGTERM: the router finishes its streams, then the nodes end; a second
           one ends everything at once
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baton.bundled_model import DEFAULT_MODEL
from baton.children import Child
from baton.config import node_environment, visible_gpus
from baton.model_report import report_on
from engine.drafting.config import parse_speculative_config
from node import machine
from node.devices import is_gpu, num_gpus, resolve_device, spread
from node.flags import add_decode_arguments, add_engine_arguments
from router.flags import add_arguments as add_router_arguments
from wire.errors import ConfigError

_MAX_RESTARTS = 3  # of one node within the window; more is a fault that restarting does not cure
_RESTART_WINDOW_S = 60.0
_BACKOFF_S = 1.0  # longer before each further restart within the window
_STOP_TIMEOUT_S = 40.0


def main(argv: Sequence[str]) -> int:
    """Serve until stopped; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_model(args)
    return asyncio.run(serve(args))


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


def make_parser() -> argparse.ArgumentParser:
    """The flags of `baton serve`."""
    parser = argparse.ArgumentParser(
        prog="baton serve",
        description="""\
Serve a model on this machine: one router, prefill nodes and decode nodes, each a process; or
mixed nodes, each of which serves requests alone.
Without MODEL it serves the small Python-writing model that ships with Baton.

  baton serve
  baton serve ./my-model --prefill 1 --decode 2 --port 9000
  baton serve ./my-model --mixed 2
  baton serve ./my-model --flex 2""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fleet_arguments(parser)
    add_router_arguments(parser)
    parser.set_defaults(control_port=0)  # any free one: several fleets may share a machine
    return parser


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


def _num_devices() -> int:
    """GPUs that this process's children see."""
    visible = visible_gpus()
    return num_gpus() if visible is None else visible


AddArguments = Callable[[argparse.ArgumentParser], None]


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


async def serve(args: argparse.Namespace) -> int:
    """Start everything, print one line when ready, supervise until the end."""
    launcher = Launcher(args)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_kill() -> None:
        if stopped.is_set():
            launcher.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_or_kill)
    run = asyncio.create_task(launcher.run())
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((run, stop), return_when=asyncio.FIRST_COMPLETED)
        if run.done():
            return run.result()
        _say("stopping")
        return 0
    finally:
        for task in (run, stop):
            task.cancel()
        await asyncio.gather(run, stop, return_exceptions=True)
        await launcher.stop()


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to keep alive."""

    name: str
    role: str


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


def print_ready(url: str, what: str) -> None:
    """The ready line of `baton serve`."""
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton ready {url} {what}", flush=True)


class Launcher:
    """Owns the child processes.

    Args:
        on_ready: is told the router's URL and what it took, once all nodes serve.
    """

    def __init__(
        self, args: argparse.Namespace, on_ready: Callable[[str, str], None] = print_ready
    ) -> None:
        self._args = args
        self._on_ready = on_ready
        self._model_name = Path(args.model).resolve().name
        self._specs = node_specs(args)
        self._env = node_environment(
            args.threads or max(1, machine.usable_cores() // len(self._specs))
        )
        self._router: Child | None = None
        self._nodes: dict[str, Child] = {}
        self._deaths: dict[str, list[float]] = {}

    async def run(self) -> int:
        """Start, say when ready, supervise; returns when the fleet cannot go on."""
        started = time.monotonic()
        self._router = self._make_router()
        await self._router.start()
        router = await self._router.ready()
        if router is None:
            _say(self._router.obituary())
            return 1
        control = router["control"]
        for spec in self._specs:
            await self._start_node(spec, control)
        _say(f"{self._describe()}: loading {self._model_name}")
        if notice := tuner_notice(self._args):
            _say(notice)
        if not await self._all_ready():
            return 1
        took = time.monotonic() - started
        self._on_ready(router["http"], f"{self._describe()} in {took:.1f} s")
        return await self._supervise(control)

    def _describe(self) -> str:
        counts = node_counts(self._args).items()
        return f"({', '.join(f'{count} {kind}' for kind, count in counts if count)})"

    async def _all_ready(self) -> bool:
        """Wait for all nodes; False as soon as any process has ended, which is then said."""
        assert self._router is not None
        loading = {asyncio.create_task(node.ready()): node for node in self._nodes.values()}
        router_end = asyncio.create_task(self._router.wait())
        try:
            while loading:
                waits = [*loading, router_end]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                done = [task for task in loading if task.done()]
                dead = [loading[task] for task in done if task.result() is None]
                if router_end.done():
                    dead = [self._router]
                if dead:
                    _say(dead[0].obituary())
                    return False
                for task in done:
                    del loading[task]
            return True
        finally:
            for waiting in (*loading, router_end):
                waiting.cancel()

    async def _supervise(self, control: str) -> int:
        """Restart nodes that die; return when the router has died or a node keeps dying."""
        watches = [asyncio.create_task(self._keep(spec, control)) for spec in self._specs]
        watches.append(asyncio.create_task(self._watch_router()))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                watch.result()  # or the error that ended it
            return 1
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch_router(self) -> None:
        assert self._router is not None
        await self._router.wait()
        _say(self._router.obituary())

    async def _keep(self, spec: NodeSpec, control: str) -> None:
        """Start the node again whenever it has died; return when that is of no use."""
        while True:
            node = self._nodes[spec.name]
            await node.wait()
            num_deaths = self._count_death(spec.name)
            if num_deaths > _MAX_RESTARTS:
                _say(node.obituary())
                _say(f"{spec.name} died {num_deaths} times in {_RESTART_WINDOW_S:.0f} s; giving up")
                return
            _say(f"{node.obituary()}; starting it again")
            await asyncio.sleep((num_deaths - 1) * _BACKOFF_S)
            await self._start_node(spec, control)

    def _count_death(self, name: str) -> int:
        """The node's deaths within the window, this one included."""
        now = time.monotonic()
        recent = [t for t in self._deaths.get(name, []) if t > now - _RESTART_WINDOW_S]
        self._deaths[name] = [*recent, now]
        return len(self._deaths[name])

    async def _start_node(self, spec: NodeSpec, control: str) -> None:
        number = self._specs.index(spec)
        argv = [
            *(sys.executable, "-m", "baton.node", spec.role, self._args.model),
            *("--router", control, "--name", spec.name, "--log-level", "warning"),
            *given_flags(add_engine_arguments, on_its_device(self._args, number, _num_devices())),
        ]
        if self._args.key_file is not None:
            argv += ["--key-file", str(self._args.key_file)]
        argv += given_flags(add_decode_arguments, self._args)
        child = self._nodes[spec.name] = Child(spec.name, argv, self._env)
        await child.start()

    def _make_router(self) -> Child:
        program = ("router",) if self._args.workers == 1 else ("baton", "router")
        argv = [
            *(sys.executable, "-m", *program, "--tokenizer", self._args.model),
            *given_flags(add_router_arguments, self._args),
        ]
        return Child("router", argv, self._env)

    async def stop(self) -> None:
        """End all children: the router first, so that its streams can finish."""
        if self._router is not None:
            await self._router.stop(_STOP_TIMEOUT_S)
        await asyncio.gather(*(node.stop(_STOP_TIMEOUT_S) for node in self._nodes.values()))

    def kill(self) -> None:
        """End all children at once; `stop` still reaps them."""
        for child in (self._router, *self._nodes.values()):
            if child is not None:
                child.kill()


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("at least 0")
    return number


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton serve: {text}", file=sys.stderr, flush=True)
