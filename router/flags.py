"""The router's flags; their defaults are `RouterConfig`'s."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from router.access_config import access_from_args, add_access_arguments
from router.config import RouterConfig
from router.tools.choose import FORMATS
from router.way import Mode
from wire.types import Pooling

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RouterConfig)}

_HELP: dict[str, str] = {
    "host": "address of the HTTP server",
    "port": "port of the HTTP server (0: any free one)",
    "control_host": "address where nodes connect",
    "control_port": "port where nodes connect (0: any free one, told in the ready line)",
    "workers": "router processes that share the HTTP port, for more than one core's worth of "
    "streams. They take the control ports from --control-port on; nodes need only one of them. "
    "One that dies loses its streams and is started again. Limits per API key hold for all",
    "max_streams": "choices on nodes at the same time, of each worker",
    "max_queue": "choices that may wait, of each worker; beyond it the answer is 429",
    "queue_timeout_s": "how long a choice may wait for capacity; then the answer is 503",
    "request_timeout_s": "how long a request may take",
    "reserve_timeout_s": "how long a decode node may take to answer a reservation",
    "heartbeat_s": "interval of heartbeats, both ways",
    "node_timeout_s": "a node that is silent for so long is dead",
    "node_stall_s": "a node without progress for so long loses its requests",
    "max_body_bytes": "largest request body; beyond it the answer is 413",
    "body_timeout_s": "how long a client may take to send a body",
    "idle_connection_s": "a connection that brings no whole request head for so long is closed",
    "stream_buffer_bytes": "what may wait for a client that does not read its stream",
    "response_ttl_s": "how long a response of /v1/responses is kept after its last use",
    "response_store_bytes": "what kept responses may take; the oldest go first",
    "max_logprobs": "most alternatives per token that a client may ask for",
    "hold_headers_s": "how long a stream's status waits for the first token, so that an earlier "
    "error has a status of its own and Server-Timing is known (0: not at all)",
    "debug_requests": "finished choices that /debug/requests remembers, of each worker (0: no such "
    "route)",
    "shutdown_timeout_s": "how long running requests may take to finish at shutdown",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    for name, text in _HELP.items():
        default = _DEFAULTS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar=type(default).__name__.upper(),
            help=f"{text} (default: {default})",
        )
    _add_model_arguments(parser)
    _add_answer_arguments(parser)
    _add_trust_arguments(parser)
    _add_tuner_arguments(parser)
    add_access_arguments(parser)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=_DEFAULTS["log_level"],
        help="what to log on stderr (default: %(default)s)",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is named, read and understood."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="model folder or tokenizer.json (default: ask the first node)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names that clients may use for the model; answers carry the first "
        "(default: the nodes' own)",
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=("auto", *FORMATS),
        default=_DEFAULTS["tool_call_parser"],
        help="how the model writes its calls (default: what its chat template shows, else hermes)",
    )
    parser.add_argument(
        "--reasoning-parser",
        choices=("auto", "think", "none"),
        default=_DEFAULTS["reasoning_parser"],
        help="whether text in <think></think> is told as reasoning_content "
        "(default: if the chat template knows it)",
    )


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """What is answered beside tokens."""
    parser.add_argument(
        "--response-store",
        type=Path,
        metavar="PATH",
        help="file (SQLite) that keeps what /v1/responses has answered; several routers of one "
        "machine may share it (default: in memory, lost with the router)",
    )
    parser.add_argument(
        "--pooling",
        choices=[pooling.value for pooling in Pooling],
        default=Pooling.LAST.value,
        help="which hidden states make an embedding: the last token's, or the mean of all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--console",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve the page at / (default: %(default)s)",
    )


def _add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom the router believes."""
    parser.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="let clients send a `chat_template` of their own; it runs in a sandbox, which bounds "
        "what it may touch, not how long it takes",
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="PATH",
        help="the fleet's key, made by `baton keygen`; nodes without it are not heard",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow addresses that other machines reach, without keys",
    )


def _add_tuner_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune",
        choices=("off", "dry-run", "on"),
        default="off",
        help="move nodes between prefill and decode as the work changes; dry-run only says what it "
        "would do (default: %(default)s)",
    )
    parser.add_argument(
        "--tune-profile",
        type=Path,
        metavar="FILE",
        help="what the nodes' steps take, as `baton profile` measured it",
    )
    parser.add_argument(
        "--handoff",
        choices=[mode.value for mode in Mode],
        default=_DEFAULTS["handoff"].value,
        help="whether prompts are computed by another node than the one that answers: auto "
        "predicts both ways for each request, by what was measured of earlier ones, and keeps "
        "streams from waiting; always and never do so wherever nodes allow (default: %(default)s)",
    )
    parser.add_argument(
        "--slo-ttft-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="limit of the time to first token, for the tuner and for --handoff auto",
    )
    parser.add_argument(
        "--slo-tpot-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="limit of the time per further token, for both",
    )


def from_args(args: argparse.Namespace) -> RouterConfig:
    """Raises ConfigError where the flags contradict each other."""
    names = {field.name for field in fields(RouterConfig)} - {"access", "place"}
    given = {name: getattr(args, name) for name in names}
    given["access"] = access_from_args(args)
    given["place"] = getattr(args, "place", None)
    given["handoff"] = Mode(args.handoff)
    given["pooling"] = Pooling(args.pooling)
    given["served_model_name"] = tuple(args.served_model_name)
    return RouterConfig(**given)
