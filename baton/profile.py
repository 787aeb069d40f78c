"""`baton profile`: what steps of one engine take on this machine, fitted for the planner.

What lies between two machines is told with `--link-gbit-s` and `--link-latency-ms`. What a fleet
adds to its engines' steps is measured on one that runs (`--fleet`).
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from dataclasses import replace
from pathlib import Path

import torch

from baton.bundled_model import DEFAULT_MODEL
from baton.device_names import device_text
from baton.profile_load import under_load
from baton.profiler import BLOCK_SIZE, LEAST_MODEL_LEN, Profiler, stopwatch_for, transfers
from baton.simulation.setup import HOP_S, HOPS_TO_FIRST_TOKEN
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.numerics import dtype_name
from node.machine import look
from tuner.files import check_places
from tuner.flags import at_least_one, positive
from tuner.latency import LatencyModel, Sample, fit, relative_errors
from tuner.overheads import Overheads, overheads_of
from tuner.probe import check, probe
from tuner.profile import Profile, fit_error, save_profile
from tuner.quiet import noisy_line
from wire.errors import ConfigError
from wire.geometry import geometry_for
from wire.layout import KVLayout

LOAD_S = 30.0  # of requests that come and go
EXAMPLES = """example, the second with what a fleet adds to its engines' steps:
  baton profile ./my-model -o profile.json --threads 1

  baton serve ./my-model --prefill 1 --decode 1 --threads 1 --handoff always
  baton profile ./my-model -o profile.json --threads 1 --fleet http://127.0.0.1:8000

`baton plan` reads the file. Run it on a machine that does nothing else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton profile`."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=DEFAULT_MODEL, help="folder (the bundled model)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    add("--threads", type=at_least_one, default=1, metavar="N", help="of one node (%(default)s)")
    add("--dtype", default="auto", help="as the nodes' (%(default)s)")
    add(
        "--max-model-len",
        type=at_least_one,
        metavar="N",
        help="as the nodes' (all that the model can)",
    )
    add(
        "--seconds",
        type=positive,
        default=110.0,
        metavar="S",
        help="of the engine, about; every case is measured once at least (%(default)g)",
    )
    add(
        "--fleet",
        metavar="URL",
        help="measure the overheads too of an idle fleet of one prefill and one decode node as "
        "these, served with --handoff always; takes two minutes more",
    )
    add("--chunk", type=int, default=512, metavar="N", help="its --max-num-batched-tokens (512)")
    add("--link-gbit-s", type=positive, metavar="R", help="rate between nodes, if not one machine")
    add("--link-latency-ms", type=float, default=0.2, metavar="MS", help="(%(default)g)")


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write, and say how well it fits."""
    check_places(args.output)
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, dtype=args.dtype, max_model_len=args.max_model_len)
    if loaded.max_model_len < LEAST_MODEL_LEN:
        raise ConfigError(
            f"{loaded.max_model_len} tokens (--max-model-len, or all that the model can) are too "
            f"few to profile: it takes {LEAST_MODEL_LEN}"
        )
    if args.fleet:
        asyncio.run(check(args.fleet, loaded.name))
    layout = loaded.kv_layout(BLOCK_SIZE)
    profiler = Profiler(loaded, layout, stopwatch_for(loaded.device, args.threads))
    prefill = profiler.prefills(args.seconds / 2)
    decode = profiler.decodes(args.seconds / 2)
    transfer = transfers(layout, args.link_gbit_s, args.link_latency_ms)
    profile = fitted(loaded, layout, device_name(loaded, args.threads), prefill, decode, transfer)
    profile = replace(profile, spread=profiler.spread())
    if args.fleet:
        profile = with_fleet(profile, args.fleet, args.chunk)
    save_profile(profile, args.output)
    for name, error in profile.errors.items():
        print(
            f"{name:9} {error.num_samples:4} samples, off by {error.p50:.1%} (median), "
            f"{error.p90:.1%} (90th percentile)"
        )
    if args.fleet:
        print(fleet_line(profile.overheads))
    if line := noisy_line(profile.spread):
        print(line)
    return 0


def with_fleet(profile: Profile, url: str, chunk: int) -> Profile:
    """The profile with what a running fleet takes besides its engines' steps. ConfigError."""
    told = asyncio.run(probe(url, profile.model_name, chunk, profile.max_model_len, print))
    typical = told.alone[len(told.alone) // 2].prompt_tokens
    size = profile.layout.num_blocks(typical) * profile.layout.block_bytes
    last_slice = profile.latency.transfer_s(size) / geometry_for(profile.layout).num_layer_groups
    hops_s, handoff_hop_s = HOPS_TO_FIRST_TOKEN * HOP_S, HOP_S + last_slice
    spread, seed = {**profile.spread, "fleet": told.spread}, secrets.randbits(32)
    try:
        probed = overheads_of(told, profile.latency, chunk, hops_s, handoff_hop_s)
        profile = replace(profile, overheads=probed, spread=spread)
        return replace(profile, overheads=under_load(profile, url, chunk, LOAD_S, seed))
    except ValueError as error:
        raise ConfigError(f"{url} was not idle: {error}") from error


def fleet_line(found: Overheads) -> str:
    return (
        f"fleet     {found.front_s * 1e3:.2f} ms per request, {found.handoff_s * 1e3:.2f} ms per "
        f"handoff; a decode step {found.step_s * 1e3:+.2f} ms {found.stream_s * 1e3:+.3f} ms per "
        f"stream, all of it {found.decode_factor:.2f} times, a prefill "
        f"{found.prefill_factor:.2f} times the engine's; while both compute "
        f"{found.prefill_slowdown:.2f} (prefill) and {found.decode_slowdown:.2f} times (decode)"
    )


def device_name(loaded: LoadedModel, threads: int) -> str:
    """What decides the speed, in words."""
    device = look().cpu_model if loaded.device == "cpu" else torch.cuda.get_device_name()
    return device_text(device, threads, dtype_name(loaded.dtype))


def fitted(
    loaded: LoadedModel,
    layout: KVLayout,
    device: str,
    prefill: list[Sample],
    decode: list[Sample],
    transfer: list[Sample],
) -> Profile:
    a, b, c = fit(prefill, 3)
    d, e, f = fit(decode, 3)
    g, h = fit(transfer, 2)
    model = LatencyModel((a, b, c), (d, e, f), (g, h))
    errors = {
        "prefill": fit_error(relative_errors(model.prefill, prefill)),
        "decode": fit_error(relative_errors(model.decode, decode)),
        "transfer": fit_error(relative_errors(model.transfer, transfer)),
    }
    return Profile(
        model_name=loaded.name,
        model_fingerprint=loaded.fingerprint,
        device=device,
        max_model_len=loaded.max_model_len,
        layout=layout,
        latency=model,
        errors=errors,
    )
