"""The one table of metric names.

Where vLLM has a metric of the same meaning, its name is used, so that existing dashboards work.
Baton's own begin with `baton_`. Names stand here without the suffix that a counter gets on export.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricName:
    """A metric's name and what it tells."""

    name: str
    help: str


# ---------------------------------------------------------------- nodes

NUM_REQUESTS_RUNNING = MetricName(
    "vllm:num_requests_running", "Requests in the running batch of this process."
)
NUM_REQUESTS_WAITING = MetricName(
    "vllm:num_requests_waiting", "Requests that wait to be scheduled in this process."
)
KV_CACHE_USAGE = MetricName(
    "vllm:kv_cache_usage_perc",
    "KV blocks in use; 1 means all of them. Cached blocks count as free.",
)
NODE_BLOCKS = MetricName(
    "baton_blocks", "KV blocks by state; the states sum to baton_blocks_total."
)
NODE_BLOCKS_TOTAL = MetricName("baton_blocks_total", "KV blocks of this node.")
NODE_STEPS = MetricName("baton_steps", "Forward passes of this node.")
TRANSFER_BYTES_SENT = MetricName("baton_transfer_bytes_sent", "KV bytes handed to a transport.")
TRANSFER_BYTES_RECEIVED = MetricName("baton_transfer_bytes_received", "KV bytes placed in blocks.")
TRANSFER_UNITS_DROPPED = MetricName(
    "baton_transfer_units_dropped", "KV units that were placed nowhere, by cause."
)
HANDOFFS = MetricName("baton_handoffs", "Handoffs that ended here, by outcome.")
