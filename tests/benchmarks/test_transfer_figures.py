"""The figures of the transfer benchmark that can be checked without two processes."""

from __future__ import annotations

import os

import pytest

from benchmarks import bench_transfer
from benchmarks.quiet import is_quiet
from benchmarks.serve.fleet import FirstToSecond
from benchmarks.serve.overlap import Overlap, Sums, read_sums
from benchmarks.transfer_receiver import Case, Rates

PAGE = """\
# HELP baton_transfer_bytes KV bytes of a committed handoff
# TYPE baton_transfer_bytes histogram
baton_transfer_bytes_bucket{le="+Inf",transport="shm"} 2.0
baton_transfer_bytes_count{transport="shm"} 2.0
baton_transfer_bytes_sum{transport="shm"} 3000.0
baton_transfer_bytes_sum{transport="zmq"} 7.0
# TYPE baton_transfer_tail_bytes histogram
baton_transfer_tail_bytes_sum{transport="shm"} 90.0
# TYPE baton_transfer_tail_seconds histogram
baton_transfer_tail_seconds_sum{transport="shm"} 0.5
"""


def test_sums_of_a_metrics_page() -> None:
    found = read_sums(PAGE, "shm")
    assert found == Sums(num_bytes=3000, tail_bytes=90, tail_s=0.5)
    assert found.since(Sums(1000, 50, 0.25)) == Sums(2000, 40, 0.25)
    assert read_sums(PAGE, "ucx") == Sums(0, 0, 0)


def test_a_figure_is_there_or_null() -> None:
    found = {
        Case("shm", 1024, False): Rates(8, 10, 0.8, 0.9),
        Case("shm", 1024, True): Rates(6, 10, 0.6, 0.7),
    }
    figures = bench_transfer.rate_figures(found, 1024)
    assert figures["shm_vs_memcpy"] == 0.8
    assert figures["digest_cost_shm"] == 0.25
    assert figures["zmq_vs_tcp"] is figures["ucx_vs_bare"] is None
    assert bench_transfer.rate_figures(found, 2048)["digest_cost_shm"] is None


def test_the_worst_transport_counts() -> None:
    found = {
        "shm": Overlap(0.95, 10.0, FirstToSecond(1.4, 50.0, 40.0)),
        "zmq": Overlap(0.96, 12.0, FirstToSecond(1.2, 50.0, 40.0)),
    }
    figures = bench_transfer.overlap_figures(found)
    assert figures["bytes_before_last_chunk_end"] == 0.95
    assert figures["first_to_second_token_steps"] == 1.4
    assert bench_transfer.overlap_figures({})["first_to_second_token_steps"] is None


@pytest.mark.parametrize(("load", "quiet"), [(0.1, True), (2.0, False)])
def test_a_busy_machine_is_told(
    load: float, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert is_quiet() == quiet
    assert ("busy" in capsys.readouterr().out) != quiet
