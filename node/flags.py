"""The nodes' flags, and the config that they describe."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from engine.drafting.config import SpeculativeConfig, parse_speculative_config
from node.config import DEFAULT_CONTROL_URL, STORAGES, NodeConfig, parse_transport
from node.devices import is_gpu, parse_device, resolve_device
from node.performance import DEFAULT_MODE, GPU_MODES, MODES, step_limits
from wire.errors import ConfigError
from wire.geometry import SCALED_DTYPES

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton prefill`, `baton decode` and `baton mixed`."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    add_connection_arguments(parser)
    add_engine_arguments(parser)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the node stands and whom it serves."""
    group = parser.add_argument_group("connections")
    group.add_argument(
        "--router",
        action="append",
        metavar="URL",
        help=f"control address of a router; give it once per router ({DEFAULT_CONTROL_URL})",
    )
    group.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    group.add_argument("--served-model-name", default="", help="name in the API (the folder's)")
    group.add_argument("--name", help="name of this node in the fleet (role, host name, pid)")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    group.add_argument(
        "--advertise-host", default="", help="host name that other nodes use to reach this one"
    )
    group.add_argument(
        "--port", type=int, default=0, help="port of /health and /metrics (0: any free one)"
    )
    group.add_argument(
        "--key-file",
        type=Path,
        metavar="PATH",
        help="the fleet's key, made by `baton keygen`; encrypts all that nodes and routers say",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="allow a --host that other machines can reach, without encryption",
    )
    group.add_argument(
        "--router-timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="wait so long for a router",
    )
    group.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="on SIGTERM, let running requests finish for so long, then hand them back",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the engine; `baton serve` passes them on to its nodes."""
    group = parser.add_argument_group("engine")
    add_device_arguments(group)
    add_model_arguments(group)
    add_kv_arguments(group)
    add_step_arguments(group)


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags that say how the model runs."""
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: float32 on CPUs without bf16 units, else the checkpoint's; on GPUs never "
        "float32, but bfloat16 for such checkpoints",
    )
    group.add_argument(
        "--weight-dtype",
        default="auto",
        choices=["auto", *STORAGES],
        help="how linears' weights are stored on CPUs, while float32 computes: 16 bits lose "
        "nothing of a checkpoint that has them, int8 changes outputs a little; both decode faster "
        "and take less memory (auto: as --dtype)",
    )
    group.add_argument(
        "--max-model-len", type=int, default=None, help="longest prompt plus output (the model's)"
    )
    group.add_argument(
        "--no-fusing",
        action="store_true",
        help="run the model as transformers wrote it: slower, to compare or to find a fault",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="refuse to start unless every request gets the same bits whatever shares its steps; "
        "on CPUs in float32 with compiled kernels that holds without the flag",
    )


def add_kv_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of the KV blocks: their memory, their way between nodes, who may hold them."""
    default = NodeConfig(Path(), "node")
    group.add_argument(
        "--block-size", type=int, default=default.block_size, help="tokens per KV block"
    )
    group.add_argument(
        "--kv-memory",  # its name until 0.1
        "--kv-cache-memory",
        type=parse_bytes,
        default=0,
        metavar="SIZE",
        help="memory of the KV block pool, e.g. 2G (a fifth of what is free once the model is "
        "loaded, at most 1G; `serve` divides by its nodes; on a GPU what "
        "--gpu-memory-utilization leaves)",
    )
    group.add_argument(
        "--transport",
        type=parse_transport,
        default=default.transport,
        metavar="NAME[,NAME]",
        help="how KV blocks travel, the best way first: shm (within one host), zmq (TCP), ucx "
        "(RDMA or TCP, not encrypted, needs baton-serve[ucx]), cuda-ipc (from GPU to GPU within "
        "one host); later ones stand in for earlier ones (auto: cuda-ipc on a GPU, then shm, then "
        "ucx where UCX has RDMA, then zmq)",
    )
    group.add_argument(
        "--kv-overcommit",
        type=float,
        default=default.kv_overcommit,
        metavar="X",
        help="promise X times the KV blocks there are; above 1 requests may be preempted",
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt from its start"
    )
    group.add_argument(
        "--lease-ttl-s",
        type=float,
        default=default.lease_ttl_s,
        metavar="S",
        help="a reservation without progress or heartbeat ends after this time",
    )


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags that say what computes."""
    group.add_argument(
        "--device",
        type=parse_device,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (auto: the first NVIDIA GPU where torch is built for CUDA, "
        "else cpu; `serve` spreads its nodes over the GPUs)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=NodeConfig(Path(), "node").gpu_memory_utilization,
        metavar="X",
        help="share of the GPU's memory that a node takes in all; what weights, the largest step "
        "and graphs leave of it is the KV pool (0.9; `serve` divides it by the nodes of a GPU)",
    )
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="capture no CUDA graphs: decoding waits for each kernel's launch",
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan and launch each step while the one before it is computed, so that a GPU never "
        "waits for the host; tokens stay the same. Steps with penalties, logprobs, a grammar, a "
        "beam search or a prompt for another node are waited for all the same, and drafting needs "
        "every one. A CPU gains nothing and tells each token a step later (on a GPU that does not "
        "draft: yes, else no)",
    )
    group.add_argument(
        "--threads", type=int, default=0, help="compute threads (0: all cores of this process)"
    )


def add_step_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags that bound what one step holds."""
    group.add_argument(
        "--performance-mode",
        default=DEFAULT_MODE,
        choices=list(MODES),
        help="sets the next three together: interactivity for the least time between tokens, "
        f"throughput for the most tokens per second ({DEFAULT_MODE}); what is given itself wins",
    )
    for flag, text in (
        ("max-num-batched-tokens", "tokens per step; longer prompts are computed in chunks"),
        ("max-num-seqs", "requests per step"),
        (
            "long-prefill-token-threshold",
            "tokens of one request per step, so that several prompts advance (0: no own limit)",
        ),
    ):
        field = flag.replace("-", "_")
        values, on_gpus = (
            ", ".join(f"{mode} {getattr(limits, field)}" for mode, limits in modes.items())
            for modes in (MODES, GPU_MODES)
        )
        text = f"{text} ({values}; on GPUs {on_gpus})"
        group.add_argument(f"--{flag}", type=int, default=None, help=text)


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """What holds while a node decodes; `baton serve` passes it on to all, as each may come to."""
    group = parser.add_argument_group("decode")
    group.add_argument(
        "--transfer-dtype",
        default=NodeConfig(Path(), "node").transfer_dtype,
        choices=["auto", *SCALED_DTYPES],
        help="how the numbers of KV blocks travel to this node (auto: in the narrower of the types "
        "that the two nodes store, without loss; int8, fp8: one byte each, which changes outputs)",
    )
    group.add_argument(
        "--speculative-config",
        default="",
        metavar="JSON",
        help='who drafts tokens ahead, e.g. {"method": "ngram"}, {"model": "./draft", '
        '"num_speculative_tokens": 5}, {"method": "eagle3", "model": "./head"} or {"method": '
        '"mtp"}; outputs stay the same (nobody)',
    )


def _async_scheduling(given: bool | None, device: str, speculative: SpeculativeConfig) -> bool:
    drafts = speculative.method != "none"
    if given and drafts:
        raise ConfigError(
            "--async-scheduling plans a step before the token is known that --speculative-config "
            "drafts from: leave one of them out"
        )
    return is_gpu(device) and not drafts if given is None else given


def from_args(args: argparse.Namespace, *, role: str, pid: int) -> NodeConfig:
    """The config that the flags describe."""
    path = Path(args.model)
    device = resolve_device(args.device)
    speculative = parse_speculative_config(vars(args).get("speculative_config", ""))
    limits = step_limits(
        args.performance_mode,
        args.max_num_batched_tokens,
        args.max_num_seqs,
        args.long_prefill_token_threshold,
        gpu=is_gpu(device),
    )
    return NodeConfig(
        model=path,
        name=args.name or f"{role}-{socket.gethostname()}-{pid}",
        routers=tuple(args.router or (DEFAULT_CONTROL_URL,)),
        served_model_name=args.served_model_name or path.resolve().name,
        host=args.host,
        advertise_host=args.advertise_host,
        port=args.port,
        key_file=args.key_file,
        insecure=args.insecure,
        transport=args.transport,
        device=device,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cuda_graphs=not args.enforce_eager,
        dtype=args.dtype,
        threads=args.threads,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        kv_memory=args.kv_memory,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        long_prefill_token_threshold=limits.long_prefill_token_threshold,
        kv_overcommit=args.kv_overcommit,
        enable_prefix_caching=not args.no_prefix_caching,
        async_scheduling=_async_scheduling(args.async_scheduling, device, speculative),
        weight_dtype=args.weight_dtype,
        fusing=not args.no_fusing,
        deterministic=args.deterministic,
        lease_ttl_s=args.lease_ttl_s,
        # decode nodes have these:
        transfer_dtype=vars(args).get("transfer_dtype", "auto"),
        speculative=speculative,
        router_timeout_s=args.router_timeout_s,
        drain_timeout_s=args.drain_timeout_s,
    )


def parse_bytes(text: str) -> int:
    """Bytes in a size like 512M or 2g."""
    number = text.rstrip("bBiIkKmMgG")
    unit = text[len(number) :].lower().rstrip("b").rstrip("i")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 512M or 2G") from None
