"""The flags of `baton bench`; `tuner.settings` says what they mean together."""

from __future__ import annotations

import argparse
from pathlib import Path

from tuner.arrivals import PLAIN_SHAPE, Arrival
from tuner.client import Endpoint
from tuner.trace_files import TraceFormat
from tuner.workload import PromptKind, Span

DEFAULT_NUM_REQUESTS = 100
DEFAULT_CONCURRENCY = 8
MAX_IN_FLIGHT = 1000  # with --rate and no --concurrency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton bench`."""
    _add_target_arguments(parser.add_argument_group("what to ask"))
    _add_request_arguments(parser.add_argument_group("requests"))
    load = parser.add_argument_group("load")
    _add_load_arguments(load)
    _add_arrival_arguments(load)
    _add_trace_arguments(parser.add_argument_group("recorded load"))
    _add_report_arguments(parser.add_argument_group("report"))


def _add_target_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", default="http://127.0.0.1:8000", help="endpoint (%(default)s)")
    add("--model", help="model name (the first one that the endpoint lists)")
    add(
        "--endpoint",
        choices=[endpoint.value for endpoint in Endpoint],
        default=Endpoint.COMPLETIONS.value,
        help="route to use (%(default)s)",
    )
    add("--api-key", help="sent as a bearer token")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="another HTTP header")
    add(
        "--timeout",
        type=positive,
        default=600.0,
        metavar="S",
        help="seconds after which a request counts as failed (%(default)g)",
    )


def _add_request_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input-len",
        type=span,
        default="128",
        metavar="N|LO:HI",
        help="prompt length in tokens, or in words (%(default)s)",
    )
    add(
        "--output-len",
        type=span,
        default="64",
        metavar="N|LO:HI",
        help="tokens to generate at most (%(default)s)",
    )
    add("--ignore-eos", action="store_true", help="ask for exactly --output-len tokens")
    add(
        "--prompt-kind",
        choices=[kind.value for kind in PromptKind],
        help="random token ids or random words (tokens; words for chat)",
    )
    add(
        "--token-ids",
        type=span,
        default="10:1000",
        metavar="LO:HI",
        help="range that random token ids are drawn from (%(default)s)",
    )
    add("--temperature", type=float, default=0.0, help="(%(default)g)")
    add("--seed", type=int, default=0, help="of prompts and arrival times (%(default)s)")


def _add_load_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--num-requests",
        type=at_least_one,
        metavar="N",
        help=f"requests to send ({DEFAULT_NUM_REQUESTS}, or as many as fit in --duration)",
    )
    add("--duration", type=positive, metavar="S", help="seconds to send for")
    add(
        "--concurrency",
        type=at_least_one,
        metavar="N",
        help=f"requests in flight ({DEFAULT_CONCURRENCY}); with --rate an upper limit only "
        f"({MAX_IN_FLIGHT})",
    )
    add("--rate", type=positive, metavar="R", help="send R requests per second")
    add(
        "--sweep",
        type=positive,
        nargs="+",
        default=(),
        metavar="R",
        help="run once at each of these rates, with requests of the same lengths",
    )
    add("--warmup", type=_natural, default=0, metavar="N", help="requests before (%(default)s)")


def _add_arrival_arguments(group: argparse._ArgumentGroup) -> None:
    """The shape has the defaults: so it is seen when a flag was given that the arrival ignores."""
    add, shape = group.add_argument, PLAIN_SHAPE
    add(
        "--arrival",
        choices=[arrival.value for arrival in Arrival],
        help="times between requests with --rate (fixed; of a trace: its own, faster or slower)",
    )
    add(
        "--burstiness",
        type=float,
        metavar="B",
        help=f"of gamma: 1 is Poisson, below it requests come in clumps ({shape.burstiness:g})",
    )
    add(
        "--period",
        type=float,
        metavar="S",
        help=f"of onoff and diurnal ({shape.period_s:g})",
    )
    add(
        "--on-share",
        type=float,
        metavar="X",
        help=f"of onoff: which part of a period has load ({shape.on_share:g})",
    )
    add(
        "--swing",
        type=float,
        metavar="X",
        help=f"of diurnal: how far the rate leaves its mean, 0 to 1 ({shape.swing:g})",
    )


def _add_trace_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay Mooncake JSONL, Azure or BurstGPT CSV, or a file of prompts; at its own "
        "times, which --rate and --sweep bring to a rate",
    )
    add(
        "--trace-format",
        choices=[form.value for form in TraceFormat],
        help="(told by its first line)",
    )
    add(
        "--rate-scale",
        type=positive,
        metavar="F",
        help="requests per second of the trace times this (1)",
    )
    add(
        "--length-scale",
        type=positive,
        metavar="F",
        help="lengths of the trace times this (1)",
    )
    add(
        "--max-model-len",
        type=at_least_one,
        metavar="N",
        help="leave requests out that are longer, prompt and output together",
    )


def _add_report_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ttft",
        type=positive,
        metavar="MS",
        help="limit of time to first token; with --tpot: report goodput",
    )
    add("--tpot", type=positive, metavar="MS", help="limit of time per further token")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON ('-': to stdout)")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="write it with plots; `baton bench report` draws several JSON files into one",
    )


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def span(text: str) -> Span:
    try:
        return Span.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
