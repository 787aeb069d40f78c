"""The parts of the serving benchmark that can be checked without a fleet."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.serve.fleet import median_first_to_second
from benchmarks.serve.memory import Memory, children, memory_of, parse_smaps
from benchmarks.serve.memory import resident_bytes as resident
from benchmarks.serve.processes import ProcessFailed, free_port, running
from benchmarks.serve.streams import Call, Stream, open_together, read_streams
from tuner.record import RequestRecord

SMAPS = """\
7f00-7f10 r--p 00000000 08:01 42  /models/x/model.safetensors
Rss:                  64 kB
Shared_Clean:         22 kB
Private_Clean:        40 kB
Private_Dirty:         2 kB
7f10-7f20 rw-p 00000000 00:00 0
Rss:                 108 kB
Shared_Clean:        100 kB
Private_Clean:         1 kB
Private_Dirty:         7 kB
"""


def test_smaps_tells_weight_files_from_the_rest() -> None:
    assert parse_smaps(SMAPS) == Memory(private=8 * 1024, weight_files=64 * 1024)


def test_memory_of_this_process() -> None:
    assert 0 < memory_of(os.getpid()).private <= resident(os.getpid())


def test_children_are_found_at_any_depth() -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:
            while not any("sleep 60" in command for command in children(child.pid).values()):
                assert child.poll() is None
            (grandchild,) = children(child.pid)
            assert grandchild in children(os.getpid())
            os.kill(grandchild, 9)
        finally:
            child.kill()


def record(*chunk_times: float) -> RequestRecord:
    return RequestRecord(0, 0, 0, chunk_times[-1], chunk_times, output_tokens=len(chunk_times))


def test_first_to_second_is_in_steps_of_the_same_request() -> None:
    records = [record(1, 3, 4, 5, 6), record(1, 5, 7, 9, 11), record(0, 9, 10, 11, 12)]
    found = median_first_to_second(records)
    assert (found.steps, found.second_ms, found.step_ms) == (2, 4000, 1000)


def test_floor_streams_in_bursts(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serve.floor", "--port", str(port)]
    with running([*command, "--period", "0.01", "--group-size", "4"], tmp_path / "log") as floor:
        url = floor.wait_for(r"^floor ready (\S+)", 30)[1]
        streams = asyncio.run(read_streams([Call("GET", f"{url}/stream?events=5")] * 8))
    for stream in streams:
        assert stream.error is None
        assert len(stream.arrivals) == 5
        sent = [event["sent_ns"] for _, event in stream.arrivals]
        assert all(before < after for before, after in pairwise(sent))
        assert all(at > event["sent_ns"] for at, event in stream.arrivals)
    assert floor.popen.returncode is not None


def test_a_refused_stream_is_an_error() -> None:
    (stream,) = asyncio.run(read_streams([Call("GET", f"http://127.0.0.1:{free_port()}/")]))
    assert "ClientConnectorError" in str(stream.error)


def test_streams_open_together() -> None:
    spans = [(0, 10), (5, 20), (8, 9), (11, 30)]
    assert open_together(Stream([(at, {}) for at in span]) for span in spans) == 3
    assert open_together([Stream([])]) == 0


def test_a_process_that_ends_early_shows_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no luck')"]
    with (
        running(command, tmp_path / "log") as process,
        pytest.raises(ProcessFailed, match=r"ended; .*\n*.*no luck"),
    ):
        process.wait_for("ready", 30)


def test_what_a_process_started_is_gone_afterwards(tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print('pid', p.pid); p.wait()"
    with running([sys.executable, "-uc", code], tmp_path / "log") as process:
        pid = int(process.wait_for(r"pid (\d+)", 30)[1])
        assert Path(f"/proc/{pid}").exists()
    while _alive(pid):  # the signal is on its way; the test's time limit is the bound
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
