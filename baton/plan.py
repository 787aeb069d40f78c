"""`baton plan`: how to divide a number of nodes for a workload and two limits, by simulation."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from baton.device_names import device_like
from baton.plan_report import plan_html
from baton.simulation.planner import Candidate, Plan, Planner
from baton.simulation.setup import Setup, Split
from engine.checkpoint import fingerprint as fingerprint_of
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from node.flags import parse_bytes
from tuner.arrivals import Arrival, arrival_offsets
from tuner.files import check_places, write_text
from tuner.flags import at_least_one, positive, span
from tuner.goodput import Slo
from tuner.plots import require_matplotlib
from tuner.profile import Profile, load_profile
from tuner.trace import Trace, TracedRequest, limit_lengths, repeated, scale_lengths
from tuner.trace_files import read_trace
from tuner.workload import PromptKind, Workload, requests
from wire.errors import ConfigError

SCHEMA = "baton.plan/1"
USUAL = 512  # tokens per step, as nodes have it
FURTHER = (128, 256, 1024, 2048)  # what else is tried where nobody says
LONG_ENOUGH = 10  # times the limit of the TTFT: so long requests should come
EXAMPLES = """example:
  baton profile ./my-model -o profile.json --threads 1
  baton plan --profile profile.json --nodes 4 --ttft 500 --tpot 50 \\
      --input-len 64:512 --output-len 32:128
  baton plan --profile profile.json --nodes 8 --ttft 500 --tpot 50 --trace azure.csv \\
      --length-scale 0.1 --tokens-per-step 64 --tokens-per-step 512 --html plan.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton plan`."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add(
        "--profile",
        type=Path,
        required=True,
        metavar="FILE",
        help="what one node takes; `baton profile MODEL` measures it",
    )
    add("--nodes", type=at_least_one, required=True, metavar="N", help="nodes to divide")
    add("--ttft", type=float, required=True, metavar="MS", help="limit of time to first token")
    add("--tpot", type=float, required=True, metavar="MS", help="limit of time per output token")
    add(
        "--attainment",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the requests that must keep both limits (%(default)g)",
    )
    add(
        "--tokens-per-step",
        type=at_least_one,
        action="append",
        metavar="N",
        help="token budget of a step (--max-num-batched-tokens), several to choose from "
        "(512 with all fleets, 128 to 2048 with the best of either kind)",
    )
    add("--kv-memory", type=parse_bytes, default=1 << 30, metavar="SIZE", help="per node (1g)")
    add("--max-num-seqs", type=at_least_one, default=64, metavar="N", help="per node (%(default)s)")
    add("--model", type=Path, metavar="DIR", help="refuse a profile of any other model than this")
    add(
        "--device",
        metavar="TEXT",
        help="what the nodes run on, as the profile names it, if that is not this machine",
    )
    add("--json", type=Path, metavar="FILE", help="write the plan as JSON, with every rate tried")
    add(
        "--html", type=Path, metavar="FILE", help="write the plan with its plots (needs matplotlib)"
    )
    _add_workload_arguments(parser.add_argument_group("workload"))


def _add_workload_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--trace", type=Path, metavar="FILE", help="Mooncake, Azure or BurstGPT trace to replay")
    add(
        "--length-scale",
        type=positive,
        default=1.0,
        metavar="F",
        help="lengths of the trace times this (%(default)g)",
    )
    add("--num-requests", type=at_least_one, default=500, metavar="N", help="per run (%(default)s)")
    add("--input-len", type=span, default="512", metavar="N|LO:HI", help="(%(default)s)")
    add("--output-len", type=span, default="128", metavar="N|LO:HI", help="(%(default)s)")
    add(
        "--arrival",
        choices=[arrival.value for arrival in Arrival],
        default=Arrival.POISSON.value,
        help="without a trace (%(default)s)",
    )
    add("--seed", type=int, default=0, help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 even if it says that the limits cannot be kept."""
    profile = load_profile(args.profile)
    _check(profile, args.model, args.device)
    check_places(args.json, args.html)
    if args.html is not None:
        require_matplotlib()
    if not 0 < args.attainment <= 1:
        raise ConfigError(f"--attainment must be above 0, up to 1, not {args.attainment:g}")
    try:
        slo = Slo(args.ttft / 1e3, args.tpot / 1e3)
    except ValueError as error:
        raise ConfigError(f"--ttft, --tpot: {error}") from error
    trace = _trace(args, profile.max_model_len)
    planner = Planner(_setup(args, profile), trace, slo, args.attainment, _progress)
    given = args.tokens_per_step
    further = () if given else tuple(n for n in FURTHER if n <= profile.max_model_len)
    plan = planner.plan(args.nodes, given or [USUAL], further)
    words = "\n".join([*plan_lines(plan, served_as(args, profile)), *short_lines(plan, trace)])
    print(words)
    if args.json is not None:
        write_text(args.json, json.dumps(to_json(plan), indent=2) + "\n")
    if args.html is not None:
        write_text(args.html, plan_html(plan, words))
    return 0


def _check(profile: Profile, model: Path | None, device: str | None) -> None:
    """Raise ConfigError for a profile of another model, or of what this machine has not."""
    fingerprint = profile.model_fingerprint
    if model is not None:
        fingerprint = fingerprint_of(open_checkpoint(model), lambda *_: None)
    if device is None:
        device = device_like(profile.device)
    profile.check(model_fingerprint=fingerprint, device=device)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _setup(args: argparse.Namespace, profile: Profile) -> Setup:
    num_blocks = args.kv_memory // profile.layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"--kv-memory {args.kv_memory} holds no block")
    engine = EngineConfig(
        block_size=profile.layout.block_size,
        num_blocks=num_blocks,
        max_model_len=profile.max_model_len,
        max_num_seqs=args.max_num_seqs,
    )
    return Setup(Split(mixed=1), engine, profile.layout, profile.latency, profile.overheads)


def _trace(args: argparse.Namespace, max_model_len: int) -> Trace:
    """The workload: recorded, or drawn as `baton bench` draws it."""
    if args.trace is None:
        trace = _drawn(args)
    else:
        trace = read_trace(args.trace)
        if trace.num_skipped:
            _progress(trace.skipped_text())
        if not trace.timed:
            raise ConfigError(f"{args.trace} tells no times; a plan needs a trace that does")
        trace = scale_lengths(trace, args.length_scale)
    trace, num_dropped = limit_lengths(trace, max_model_len)
    if num_dropped:
        _progress(f"{num_dropped} requests are longer than the model's {max_model_len} tokens")
    if not trace.requests:
        raise ConfigError(f"no request fits the model's {max_model_len} tokens; scale lengths down")
    if len(trace.requests) < args.num_requests:
        _progress(f"{trace.name} has {len(trace.requests)} requests: it is replayed several times")
    return repeated(trace, args.num_requests)


def _drawn(args: argparse.Namespace) -> Trace:
    workload = Workload(args.input_len, args.output_len, PromptKind.TOKENS, seed=args.seed)
    offsets = arrival_offsets(1.0, Arrival(args.arrival), args.seed)
    drawn = zip(islice(requests(workload), args.num_requests), offsets, strict=False)
    traced = [TracedRequest(at, len(spec.prompt), spec.output_len) for spec, at in drawn]
    return Trace("drawn", tuple(traced))


# ------------------------------------------------------------ words


def served_as(args: argparse.Namespace, profile: Profile) -> str:
    """`baton serve` with what all nodes of the plan are assumed to have."""
    model = args.model or "MODEL"
    threads = re.search(r", (\d+) threads, ", profile.device)
    flags = [f"--threads {threads[1]}"] if threads else []
    flags += [f"--max-num-seqs {args.max_num_seqs}", f"--kv-memory {args.kv_memory}"]
    return " ".join([f"baton serve {model}", *flags, f"--max-model-len {profile.max_model_len}"])


def short_lines(plan: Plan, trace: Trace) -> list[str]:
    """A warning where all requests have come before a queue could build up."""
    rate = max([plan.best.rate, *(more.rate for more in plan.one_more)])
    seconds = len(trace.requests) / rate if rate else float("inf")
    if seconds >= LONG_ENOUGH * plan.slo.ttft_s:
        return []
    return [
        "",
        f"careful     at {rate:.3g} per second the {len(trace.requests)} requests have come within "
        f"{seconds:.2g} s: that may overrate fleets; simulate more of them (--num-requests)",
    ]


def plan_lines(plan: Plan, serve: str = "baton serve MODEL") -> list[str]:
    """What to do and why; `serve` is the command but for the number and kinds of nodes."""
    if not plan.possible:
        return _impossible_lines(plan)
    best = plan.best
    lines = [
        f"plan        {best}",
        f"goodput     {best.rate:.3g} requests per second, {best.per_node:.3g} per node, "
        f"with {plan.share:.0%} within {plan.slo.ttft_s * 1e3:g} ms TTFT and "
        f"{plan.slo.tpot_s * 1e3:g} ms TPOT",
        f"why         {_why(plan)}",
        f"bottleneck  {plan.bottleneck}",
        f"serve       {serve} {best.flags}",
    ]
    for more in plan.one_more:
        gain = more.rate / best.rate - 1
        lines.append(f"one more    {more.split}: {more.rate:.3g} requests per second ({gain:+.0%})")
    return [*lines, *_table(plan)]


def _why(plan: Plan) -> str:
    """The best of the other way to divide the work, beside this one."""
    others = [c for c in plan.candidates if c.colocated is not plan.best.colocated]
    if not others:
        return "there is no other way to use one node"
    other = max(others, key=lambda candidate: candidate.rate)
    if not other.rate:
        return f"{other.split} keeps the limits at no rate: it fails by {other.fails_by}"
    ratio = plan.best.rate / other.rate
    fails = f"which fails by {other.fails_by} beyond {other.rate:.3g} requests per second"
    return f"{ratio:.2f} times the goodput of the best alternative ({other}), {fails}"


def _impossible_lines(plan: Plan) -> list[str]:
    """The limits cannot be kept: what can."""
    best = plan.best
    idle = best.points[0]
    ttft, tpot = idle.ttft_s.p90 * 1e3, idle.tpot_s.p90 * 1e3
    limits = f"{plan.slo.ttft_s * 1e3:g} ms TTFT and {plan.slo.tpot_s * 1e3:g} ms TPOT"
    return [
        f"impossible  no split has {plan.share:.0%} within {limits} at any rate",
        f"best        {best}: {best.most_good:.0%} keep both",
        f"achievable  almost idle, its 90th percentiles are {ttft:.3g} ms TTFT, {tpot:.3g} ms TPOT",
        f"missing     {plan.bottleneck}",
    ]


def _table(plan: Plan) -> list[str]:
    width = max(len(str(candidate)) for candidate in plan.candidates)
    lines = ["", f"{'fleet':{width}}  requests/s  per node"]
    lines += [
        f"{found!s:{width}}  {found.rate:10.3g}  {found.per_node:8.3g}" for found in plan.candidates
    ]
    return lines


def to_json(plan: Plan) -> dict[str, Any]:
    def of(candidate: Candidate) -> dict[str, Any]:
        return {**asdict(candidate), "per_node": candidate.per_node}

    return {
        "schema": SCHEMA,
        "possible": plan.possible,
        "slo": asdict(plan.slo),
        "attainment": plan.share,
        "best": of(plan.best),
        "bottleneck": plan.bottleneck,
        "one_more": [of(candidate) for candidate in plan.one_more],
        "candidates": [of(candidate) for candidate in plan.candidates],
    }
