"""The flags of `baton bench`, and what they mean together."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner.arrivals import Arrival
from tuner.client import Endpoint, Target
from tuner.drive import Limits
from tuner.workload import PromptKind, Span, Workload
from wire.errors import ConfigError

DEFAULT_NUM_REQUESTS = 100
DEFAULT_CONCURRENCY = 8
MAX_IN_FLIGHT = 1000  # with --rate and no --concurrency


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """One run of the load generator, decided."""

    target: Target
    workload: Workload
    limits: Limits
    concurrency: int
    rate: float | None  # requests per second; None: closed loop
    arrival: Arrival
    warmup: int
    json_path: Path | None

    def as_json(self) -> dict[str, Any]:
        """All settings but the secret ones (headers carry keys)."""
        settings = asdict(self)
        del settings["json_path"], settings["target"]["headers"]
        for name in ("input_len", "output_len", "token_ids"):
            settings["workload"][name] = str(getattr(self.workload, name))
        return settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton bench`."""
    _add_target_arguments(parser.add_argument_group("what to ask"))
    _add_request_arguments(parser.add_argument_group("requests"))
    _add_load_arguments(parser.add_argument_group("load"))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report as JSON ('-': to stdout)"
    )


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
        type=_positive,
        default=600.0,
        metavar="S",
        help="seconds after which a request counts as failed (%(default)g)",
    )


def _add_request_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input-len",
        type=_span,
        default="128",
        metavar="N|LO:HI",
        help="prompt length in tokens, or in words (%(default)s)",
    )
    add(
        "--output-len",
        type=_span,
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
        type=_span,
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
        type=_count,
        metavar="N",
        help=f"requests to send ({DEFAULT_NUM_REQUESTS}, or as many as fit in --duration)",
    )
    add("--duration", type=_positive, metavar="S", help="seconds to send for")
    add(
        "--concurrency",
        type=_count,
        metavar="N",
        help=f"requests in flight ({DEFAULT_CONCURRENCY}); with --rate an upper limit only "
        f"({MAX_IN_FLIGHT})",
    )
    add("--rate", type=_positive, metavar="R", help="send R requests per second")
    add(
        "--arrival",
        choices=[arrival.value for arrival in Arrival],
        default=Arrival.FIXED.value,
        help="times between requests with --rate (%(default)s)",
    )
    add("--warmup", type=int, default=0, metavar="N", help="requests sent before (%(default)s)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def settings_from(args: argparse.Namespace) -> BenchSettings:
    """What the flags ask for.

    Raises:
        ConfigError: they contradict each other.
    """
    default_concurrency = DEFAULT_CONCURRENCY if args.rate is None else MAX_IN_FLIGHT
    return BenchSettings(
        target=_target(args),
        workload=_workload(args),
        limits=_limits(args),
        concurrency=args.concurrency or default_concurrency,
        rate=args.rate,
        arrival=Arrival(args.arrival),
        warmup=args.warmup,
        json_path=args.json,
    )


def _target(args: argparse.Namespace) -> Target:
    headers = dict(_header(text) for text in args.header)
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    return Target(
        url=args.url.rstrip("/").removesuffix("/v1"),
        model=args.model,
        endpoint=Endpoint(args.endpoint),
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        headers=headers,
        timeout_s=args.timeout,
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise ConfigError(f"--header {text!r}: expected NAME:VALUE")
    return name.strip(), value.strip()


def _workload(args: argparse.Namespace) -> Workload:
    chat = args.endpoint == Endpoint.CHAT
    default_kind = PromptKind.WORDS if chat else PromptKind.TOKENS
    kind = PromptKind(args.prompt_kind or default_kind)
    if chat and kind is PromptKind.TOKENS:
        raise ConfigError("a chat message is text: --endpoint chat needs --prompt-kind words")
    return Workload(args.input_len, args.output_len, kind, args.token_ids, args.seed)


def _limits(args: argparse.Namespace) -> Limits:
    if args.num_requests is None and args.duration is None:
        return Limits(DEFAULT_NUM_REQUESTS, None)
    return Limits(args.num_requests, args.duration)
