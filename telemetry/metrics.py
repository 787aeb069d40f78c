"""The one table of metric names.

A name with `vllm:` means what it means in vLLM, so that existing dashboards work; `baton_` is ours.
Counters are written without `_total`, which the exposition format adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600)
SHORT_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 200_000)
SMALL_COUNTS = (1, 2, 5, 10, 20, 50, 100)
HANDOFF_SECONDS = (*SHORT_SECONDS, 2.5, 5, 10, 30)
BYTES = tuple(4**power for power in range(5, 17))  # 1 KiB to 4 GiB
RATES = (1e6, 1e7, 3e7, 1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, 2e10, 5e10, 1e11)


@dataclass(frozen=True, slots=True)
class Metric:
    """One name, what it counts, its labels, and a histogram's upper bounds.

    `of_workers`: what a gauge of several routers on one port is, told as one. Counters and
    histograms are always summed.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    of_workers: Literal["sum", "max"] = "sum"

    def counter(self, registry: CollectorRegistry) -> Counter:
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)


_MODEL = ("model_name",)

# ---------------------------------------------------------------- requests, seen by the router

NUM_REQUESTS_RUNNING = Metric(
    "vllm:num_requests_running", "Choices on nodes; of a node: in its batch", _MODEL
)
NUM_REQUESTS_WAITING = Metric(
    "vllm:num_requests_waiting",
    "Choices in the router's queue; of a node: not in its batch yet",
    _MODEL,
)
PROMPT_TOKENS = Metric("vllm:prompt_tokens", "Prompt tokens of finished choices", _MODEL)
PROMPT_TOKENS_CACHED = Metric(
    "vllm:prompt_tokens_cached", "Prompt tokens that a prefix cache spared", _MODEL
)
GENERATION_TOKENS = Metric("vllm:generation_tokens", "Output tokens", _MODEL)
REQUEST_SUCCESS = Metric(
    "vllm:request_success", "Finished choices by reason", (*_MODEL, "finished_reason")
)
ADMISSION_REJECTIONS = Metric(
    "vllm:admission_rejections", "Requests answered with 429 or 503 before any work", _MODEL
)
TIME_TO_FIRST_TOKEN = Metric(
    "vllm:time_to_first_token_seconds", "From arrival to the first token", _MODEL, SECONDS
)
INTER_TOKEN_LATENCY = Metric(
    "vllm:inter_token_latency_seconds", "Between token messages of a choice", _MODEL, SECONDS
)
TIME_PER_OUTPUT_TOKEN = Metric(
    "vllm:request_time_per_output_token_seconds", "Mean after the first token", _MODEL, SECONDS
)
E2E_LATENCY = Metric(
    "vllm:e2e_request_latency_seconds", "From arrival to the last token", _MODEL, SECONDS
)
QUEUE_TIME = Metric(
    "vllm:request_queue_time_seconds", "From arrival to the dispatch to a node", _MODEL, SECONDS
)
PREFILL_TIME = Metric(
    "vllm:request_prefill_time_seconds", "From dispatch to the first token", _MODEL, SECONDS
)
DECODE_TIME = Metric(
    "vllm:request_decode_time_seconds", "From the first to the last token", _MODEL, SECONDS
)
INFERENCE_TIME = Metric(
    "vllm:request_inference_time_seconds", "From dispatch to the last token", _MODEL, SECONDS
)
REQUEST_PROMPT_TOKENS = Metric(
    "vllm:request_prompt_tokens", "Prompt length of finished choices", _MODEL, TOKENS
)
REQUEST_GENERATION_TOKENS = Metric(
    "vllm:request_generation_tokens", "Output length of finished choices", _MODEL, TOKENS
)
REQUEST_LONGEST_GENERATION = Metric(
    "vllm:request_max_num_generation_tokens",
    "Output length of the longest choice of a request",
    _MODEL,
    TOKENS,
)
REQUEST_COMPUTED_TOKENS = Metric(
    "vllm:request_prefill_kv_computed_tokens",
    "Prompt tokens that no prefix cache spared",
    _MODEL,
    TOKENS,
)
REQUEST_MAX_TOKENS = Metric("vllm:request_params_max_tokens", "max_tokens asked", _MODEL, TOKENS)
REQUEST_N = Metric("vllm:request_params_n", "n asked", _MODEL, SMALL_COUNTS)

HTTP_REQUESTS = Metric(
    "http_requests",
    "Answers, as the instrumentation counts them that vLLM uses",
    ("handler", "method", "status"),
)

# ---------------------------------------------------------------- the router itself

ROUTER_NODES = Metric("baton_router_nodes", "Registered nodes", ("role", "state"), of_workers="max")
ROUTER_WORKERS = Metric("baton_router_workers", "Routers that share the HTTP port and answer")
ROUTER_WORKER_RESTARTS = Metric(
    "baton_router_worker_restarts", "Routers of a shared port that died and were started again"
)
ROUTER_STREAMS = Metric("baton_router_streams", "Open event streams")
ROUTER_ATTEMPTS = Metric("baton_router_attempts", "Attempts begun")
ROUTER_ATTEMPTS_ENDED = Metric(
    "baton_router_attempts_ended", "Attempts given up before their end, by cause", ("cause",)
)
ROUTER_WAYS = Metric(
    "baton_router_ways",
    "Attempts by how they are served (handoff, in_place) and why it was chosen",
    ("way", "reason"),
)
ROUTER_REBINDS = Metric(
    "baton_router_rebinds", "Attempts that asked for the reservation of a failed prefill node"
)
ROUTER_ROLE_SWITCHES = Metric(
    "baton_router_role_switches",
    "Nodes that were asked for another role, by how it ended: done, refused, died or late",
    ("outcome",),
)
ROUTER_ROLE_SWITCH_SECONDS = Metric(
    "baton_router_role_switch_seconds",
    "From the question to the registration in the new role, draining included",
    (),
    SECONDS,
)
ROUTER_TUNER_DECISIONS = Metric(
    "baton_router_tuner_decisions",
    "Looks of the tuner: `prefill` and `decode` gave that role a node, `stay` left all as it was",
    ("decision",),
)
ROUTER_TUNER_PRESSURE = Metric(
    "baton_router_tuner_pressure",
    "Nodes that a role's work needs to keep the limits, per node that it has",
    ("role",),
    of_workers="max",
)
ROUTER_OPEN_PAIRS = Metric(
    "baton_router_open_pairs",
    "Pairs of nodes whose handoffs fail: chosen only for a trial, or where there is no other",
    of_workers="max",
)
ROUTER_RESERVE_REFUSALS = Metric(
    "baton_router_reserve_refusals",
    "Reservations, rebinds and whole requests that a node refused",
    ("cause",),
)
ROUTER_GRANT_WAIT = Metric(
    "baton_router_grant_wait_seconds", "From a Reserve to its grant", (), HANDOFF_SECONDS
)
ROUTER_DISCONNECTS = Metric("baton_router_client_disconnects", "Clients that left early")
ROUTER_STORE_FAILURES = Metric(
    "baton_router_response_store_failures", "Responses that were answered and could not be kept"
)
ROUTER_SLOW_CLIENTS = Metric("baton_router_slow_clients", "Streams ended because nobody read")
ROUTER_RESPONSES = Metric("baton_router_http_responses", "Answers", ("route", "status"))
ROUTER_ADDED = Metric(
    "baton_router_added_seconds",
    "From a node's message to its text handed to the sockets",
    (),
    SHORT_SECONDS,
)
ROUTER_TOKENIZE = Metric(
    "baton_router_tokenize_seconds", "Chat template and tokenization", (), SHORT_SECONDS
)
ROUTER_MALFORMED = Metric("baton_router_malformed_messages", "Messages dropped as malformed")
ROUTER_REFUSED = Metric(
    "baton_router_refused_connections", "Connections of nodes without the fleet's key"
)

# ---------------------------------------------------------------- nodes

KV_CACHE_USAGE = Metric(
    "vllm:kv_cache_usage_perc",
    "Share of KV blocks in use, 0 to 1; cached ones count as free. Of a router: of its decode "
    "nodes, as they last said",
    _MODEL,
    of_workers="max",
)
NODE_BLOCKS = Metric(
    "baton_blocks", "KV blocks by state; they sum to baton_blocks_capacity", ("state",)
)
NODE_BLOCKS_CAPACITY = Metric("baton_blocks_capacity", "KV blocks of this node")
NODE_STEPS = Metric("baton_steps", "Forward passes of this node")
NODE_STEP_SECONDS = Metric("baton_step_seconds", "Time of a step", (), SECONDS)
NODE_STEP_TOKENS = Metric("baton_step_tokens", "Tokens computed, prompts and outputs")
ITERATION_TOKENS = Metric(
    "vllm:iteration_tokens_total",
    "Tokens computed in a step, of prompts and outputs",
    _MODEL,
    (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
)
NODE_OUTPUT_TOKENS = Metric("baton_sampled_tokens", "Tokens sampled on this node")
NODE_CHUNKS = Metric("baton_unfinished_chunks", "Parts of prompts that needed a further step")
PREEMPTIONS = Metric("vllm:num_preemptions", "Requests preempted for want of blocks", _MODEL)
STEPS_AHEAD = Metric(
    "baton_steps_ahead", "Steps that were launched before the one before them was read"
)
OUT_OF_MEMORY = Metric(
    "baton_steps_out_of_memory",
    "Steps that did not fit into the device's memory and were tried again with half as much",
)
GRAPH_FAILURES = Metric(
    "baton_graph_capture_failures", "CUDA graphs that could not be captured; such steps run without"
)
CORRUPTED = Metric(
    "vllm:corrupted_requests", "Requests ended here because their logits were no numbers", _MODEL
)
PREFIX_QUERIES = Metric("vllm:prefix_cache_queries", "Prompt tokens looked up", _MODEL)
PREFIX_HITS = Metric("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", _MODEL)
SPEC_DRAFTS = Metric("vllm:spec_decode_num_drafts", "Drafts that steps computed", _MODEL)
SPEC_DRAFT_TOKENS = Metric("vllm:spec_decode_num_draft_tokens", "Their tokens", _MODEL)
SPEC_ACCEPTED_TOKENS = Metric(
    "vllm:spec_decode_num_accepted_tokens", "Draft tokens that became output", _MODEL
)
SPEC_ACCEPTED_PER_POSITION = Metric(
    "vllm:spec_decode_num_accepted_tokens_per_pos",
    "Draft tokens that became output, by their position in the draft",
    (*_MODEL, "position"),
)
SPEC_TOKENS_PER_STEP = Metric(
    "baton_spec_decode_tokens_per_step",
    "Output tokens of a drafted request in one step: accepted ones and one more",
    (),
    (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32),
)
SPEC_DRAFT_SECONDS = Metric("baton_spec_decode_draft_seconds", "Time that drafting took")
SPEC_SAVED_SECONDS = Metric(
    "baton_spec_decode_saved_seconds",
    "What the tokens of drafted steps would have taken longer one by one, by this node's own "
    "measurement of plain steps; negative where drafts were a loss",
)
SPEC_FAILURES = Metric(
    "baton_spec_decode_drafter_failures", "Drafters switched off because they failed or stalled"
)
NODE_MALFORMED = Metric(
    "baton_malformed_messages", "Messages of routers and nodes dropped as malformed"
)
NODE_REFUSED = Metric(
    "baton_refused_connections", "Connections of other nodes without the fleet's key"
)
STAGING_FULL = Metric(
    "baton_staging_full",
    "Copies between device and host that found no pinned memory left and took slower memory",
)
TRANSFER_BYTES_SENT = Metric("baton_transfer_bytes_sent", "KV bytes handed to a transport")
TRANSFER_BYTES_RECEIVED = Metric("baton_transfer_bytes_received", "KV bytes placed in blocks")
_TRANSPORT = ("transport",)
TRANSFER_BYTES = Metric(
    "baton_transfer_bytes", "KV bytes of a committed handoff", _TRANSPORT, BYTES
)
TRANSFER_SECONDS = Metric(
    "baton_transfer_seconds",
    "From a handoff's first unit to its commit; most of it while the prompt is computed",
    _TRANSPORT,
    SECONDS,
)
TRANSFER_RATE = Metric(
    "baton_transfer_rate_bytes_per_second",
    "Bytes of a committed handoff over its seconds: below the wire's rate where compute is slower",
    _TRANSPORT,
    RATES,
)
TRANSFER_TAIL_BYTES = Metric(
    "baton_transfer_tail_bytes",
    "KV bytes that had not left when the prompt's last forward pass was over",
    _TRANSPORT,
    BYTES,
)
TRANSFER_TAIL_SECONDS = Metric(
    "baton_transfer_tail_seconds",
    "From the end of the prompt's last forward pass to the commit",
    _TRANSPORT,
    HANDOFF_SECONDS,
)
TRANSFER_COMMIT_WAIT = Metric(
    "baton_transfer_commit_wait_seconds",
    "From the first token to the commit: digests, the way there and back, lost messages",
    _TRANSPORT,
    HANDOFF_SECONDS,
)
TRANSFER_MESSAGES_UNSENT = Metric(
    "baton_transfer_messages_unsent", "Messages to other nodes that could not be queued"
)
TRANSFER_UNITS_DROPPED = Metric(
    "baton_transfer_units_dropped", "KV units that were placed nowhere", ("cause",)
)
TRANSPORT_FAILURES = Metric(
    "baton_transport_failures",
    "Times a KV transport did not work and handoffs took another one",
    ("transport",),
)
HANDOFFS = Metric("baton_handoffs", "Handoffs that ended here", ("outcome",))
HANDOFFS_OPEN = Metric(
    "baton_handoffs_open", "Handoffs of a prefill or mixed node by state", ("state",)
)
LEASES = Metric("baton_leases", "Live leases of a decode or mixed node by state", ("state",))
