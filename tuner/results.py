"""What a run leaves behind in its JSON file, beside the figures: enough to draw it again.

result    one run: the report's figures, its settings, one row per request, phases, the fleet
sweep     several runs of one workload at growing rates, lowest first
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuner.goodput import Slo, attainment
from tuner.record import RequestRecord
from tuner.report import SCHEMA, build_report, to_json
from wire.errors import ConfigError

SWEEP_SCHEMA = "baton.bench-sweep/1"
Json = dict[str, Any]
SCALES = tuple(2 ** (power / 2) for power in range(-4, 7))  # of the SLO: 1/4 to 8


def result_json(
    records: Sequence[RequestRecord], settings: Json, slo: Slo | None, fleet: Sequence[Json] = ()
) -> Json:
    """One run in JSON. `fleet` has what `tuner.watch` saw."""
    report = build_report(records)
    told = to_json(report, settings)
    if slo is not None:
        good = attainment(records, slo)
        told["slo"] = {"ttft_ms": 1e3 * slo.ttft_s, "tpot_ms": 1e3 * slo.tpot_s}
        told["attainment"] = asdict(good)
        duration = report.duration_s
        told["goodput_per_s"] = good.good * len(records) / duration if duration else 0.0
        told["attainment_by_scale"] = [
            {"scale": scale, "good": attainment(records, _scaled(slo, scale)).good}
            for scale in SCALES
        ]
    told["phases_ms"] = mean_phases(records)
    told["samples"] = samples(records)
    told["fleet"] = list(fleet)
    return told


def _scaled(slo: Slo, scale: float) -> Slo:
    return Slo(slo.ttft_s * scale, slo.tpot_s * scale)


def samples(records: Sequence[RequestRecord]) -> list[Json]:
    """One row per request, in the order in which they were due."""
    if not records:
        return []
    begin = min(record.start for record in records)
    return [
        {
            "due_s": round(record.due - begin, 6),
            "start_s": round(record.start - begin, 6),
            "ttft_ms": _ms(record.ttft),
            "tpot_ms": _ms(record.tpot),
            "e2e_ms": _ms(record.e2e),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "error": record.error,
        }
        for record in sorted(records, key=lambda record: record.due)
    ]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def mean_phases(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Mean milliseconds per phase up to the first token, where the server told them."""
    told = [record.phases for record in records if record.error is None and record.phases]
    sums: dict[str, float] = {}
    for phases in told:
        for name, ms in phases.items():
            sums[name] = sums.get(name, 0.0) + ms
    return {name: total / len(told) for name, total in sums.items()}


def sweep_json(runs: Sequence[Json]) -> Json:
    """Runs in the order of their rates."""
    return {"schema": SWEEP_SCHEMA, "runs": list(runs)}


def read_results(path: Path, name: str) -> list[tuple[str, Json]]:
    """The runs of a file, called `name` in a report, with a name for each, lowest rate first.

    Raises:
        ConfigError: it cannot be read, or is not a file of `baton bench`.
    """
    try:
        told = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    runs = list(_runs(told))
    if not runs or not all(_is_result(run) for run in runs):
        raise ConfigError(f"{path} is not a result of `baton bench --json`")
    if len(runs) == 1:
        return [(name, runs[0])]
    return [(f"{name} at {run['settings']['rate']:g}/s", run) for run in runs]


def _runs(told: object) -> Iterator[Json]:
    if isinstance(told, dict) and told.get("schema") == SWEEP_SCHEMA:
        yield from told.get("runs", ())
    elif isinstance(told, dict):
        yield told


def _is_result(run: object) -> bool:
    """Whether all is there that a report draws, so that a file cut by hand is refused in words."""
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        return False
    known = ("settings", "samples", "errors", "ttft_ms", "tpot_ms", "num_requests")
    return all(name in run for name in known)


def named_results(paths: Sequence[Path]) -> dict[str, list[tuple[str, Json]]]:
    """The runs of each file, under as much of its path as tells it from the others.

    Raises:
        ConfigError: as `read_results`, or a file is given twice.
    """
    whole = [path.resolve().with_suffix("") for path in paths]
    groups = {}
    for path, full in zip(paths, whole, strict=True):
        others = [other for other in whole if other != full]
        if len(others) != len(whole) - 1:
            raise ConfigError(f"{path} is given twice")
        name = _shortest_name(full, others)
        groups[name] = read_results(path, name)
    return groups


def _shortest_name(path: Path, others: Sequence[Path]) -> str:
    """The fewest last parts of a path that none of the others ends with."""
    for number in range(1, len(path.parts)):
        tail = path.parts[-number:]
        if all(other.parts[-number:] != tail for other in others):
            return "/".join(tail)
    return str(path)
