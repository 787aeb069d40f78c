"""The table in `docs/metrics.md`, made from what the processes really export.

python -m tests.telemetry.metrics_table    # writes it
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.core import Metric as Family

from baton.worker_pages import WorkerMetrics
from engine.block_pool import BlockCounts
from kvtransfer.transport import TransferStats
from node.http import NodeCollector
from node.stats import NodeStats
from router.metrics import RouterMetrics
from telemetry import metrics
from telemetry.causes import CAUSES
from telemetry.metrics import Metric
from telemetry.timeline import MEANING
from wire.request_messages import TransferRecord
from wire.types import NodeLoad, Role

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- table: {} -->", "<!-- end -->"


def all_metrics() -> dict[str, Metric]:
    """Every name in the one table."""
    return {value.name: value for value in vars(metrics).values() if isinstance(value, Metric)}


def exported() -> dict[str, tuple[str, list[str]]]:
    """Name → its type, and the processes that export it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for process, families in _families():
        for family in families:
            found.setdefault(family.name, (family.type, []))[1].append(process)
    return found


def _one_block() -> BlockCounts:
    return BlockCounts(free=1, cached=0, leased=0, running=0, quarantined=0, total=1)


def _the(standing: object) -> Any:
    return standing


def _families() -> Iterable[tuple[str, Iterable[Family]]]:
    yield "router", RouterMetrics().registry.collect()
    yield "router (workers)", WorkerMetrics().registry.collect()
    for role, states in ((Role.PREFILL, metrics.HANDOFFS_OPEN), (Role.DECODE, metrics.LEASES)):
        stats = TransferStats()
        if role is Role.PREFILL:
            stats.count_transfer(TransferRecord("shm", 1, 1, 1.0, 1, 1.0, 1.0))
        standing = SimpleNamespace(name=role, stats=stats, open_transfers={states: {}})
        engine = SimpleNamespace(load=NodeLoad, block_counts=_one_block)
        collector = NodeCollector(
            "m",
            cast(Any, engine),
            NodeStats(),
            partial(_the, standing),
            int,
            int,
            int,
        )
        yield role.value, collector.collect()


def tables() -> dict[str, str]:
    """Each table of the page by its name."""
    where = exported()
    rows = []
    for name, metric in all_metrics().items():
        kind, processes = where[name]
        shown = name + ("_total" if kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{shown}` | {kind} | {', '.join(processes)} | {labels} | {metric.help} |")
    return {
        "metrics": _table("| name | type | of | labels | what it is |", rows),
        "causes": _table(
            "| cause | meaning |", [f"| `{cause}` | {text} |" for cause, text in CAUSES.items()]
        ),
        "phases": _table(
            "| phase | meaning |", [f"| `{phase}` | {text} |" for phase, text in MEANING.items()]
        ),
    }


def _table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def written(page: str) -> str:
    """`page` with its tables as they should be."""
    for name, table in tables().items():
        begin = BEGIN.format(name)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
