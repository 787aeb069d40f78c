"""Traces: all formats, malformed lines, shared prefixes, scaling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.trace import (
    Trace,
    TracedRequest,
    first_requests,
    limit_lengths,
    repeated,
    scale_lengths,
    scale_rate,
)
from tuner.trace_files import MOONCAKE_BLOCK, TraceFormat, detect, read_trace
from tuner.workload import PromptKind, Span, Workload, trace_requests
from wire.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tuner" / "samples"
RECORDED = ROOT.parent / "shared" / "data" / "traces"

GOOD = {
    TraceFormat.MOONCAKE: (
        '{"timestamp": 500, "input_length": 513, "output_length": 7, "hash_ids": [3, 4]}'
    ),
    TraceFormat.AZURE: "2023-11-16 18:15:46.6805900,513,7",
    TraceFormat.BURSTGPT: "0.5,ChatGPT,513,7,520,Conversation log",
    TraceFormat.PROMPTS: '{"prompt": "one two three", "output_tokens": 7}',
}
HEADER = {
    TraceFormat.AZURE: "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    TraceFormat.BURSTGPT: "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
}
BAD = {
    TraceFormat.MOONCAKE: [
        "{",
        "[]",
        "[" * 100_000,
        '{"timestamp": 1, "input_length": 5}',
        '{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 1, "input_length": 5, "output_length": true, "hash_ids": []}',
        '{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}',
    ],
    TraceFormat.AZURE: ["yesterday,5,5", "2023-11-16 18:15:46,5", "2023-11-16 18:15:46,5,0"],
    TraceFormat.BURSTGPT: ["x,m,1,1,2,l", "1,m,-1,1,2,l", "inf,m,1,1,2,l", "1,m,1"],
    TraceFormat.PROMPTS: ['{"prompt": 5}', "{}", '{"prompt": " "}', "not JSON"],
}


def written(folder: Path, form: TraceFormat, lines: list[str]) -> Path:
    path = folder / ("trace.csv" if form in HEADER else "trace.jsonl")
    path.write_text(HEADER.get(form, "") + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", list(TraceFormat))
def test_reads_and_skips(form: TraceFormat, tmp_path: Path) -> None:
    path = written(tmp_path, form, [GOOD[form], *BAD[form], GOOD[form]])
    trace = read_trace(path)
    first_bad = 3 if form in HEADER else 2
    assert len(trace.requests) == 2
    assert trace.num_skipped == len(BAD[form])
    assert [line.number for line in trace.skipped] == [
        first_bad + index for index in range(len(BAD[form]))
    ]
    assert f"{len(BAD[form])} lines skipped (line {first_bad}: " in trace.skipped_text()
    assert trace.requests[0].output_len == 7
    assert trace.requests[0].at == 0


@pytest.mark.parametrize("form", list(TraceFormat))
def test_nothing_readable_is_an_error(form: TraceFormat, tmp_path: Path) -> None:
    path = written(tmp_path, form, BAD[form])
    with pytest.raises(ConfigError, match=f"no line can be read as {form}"):
        read_trace(path, form)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_trace(tmp_path / "empty")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="neither Azure's nor BurstGPT's"):
        read_trace(tmp_path / "other.csv")


def test_text_lines_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one two\n\nthree\n")
    trace = read_trace(path)
    assert [(r.text, r.input_len, r.output_len) for r in trace.requests] == [
        ("one two", 2, 0),
        ("three", 1, 0),
    ]
    assert not trace.timed


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_line_ends_and_byte_order_marks(name: str, tmp_path: Path) -> None:
    form = TraceFormat.AZURE if name.endswith("csv") else TraceFormat.PROMPTS
    odd = '{"prompt": "one\u2028two\x85three"}'  # JSON does not escape them
    last = GOOD[form] if form is TraceFormat.AZURE else odd
    lines = [*HEADER.get(form, "").splitlines(), GOOD[form], "broken", "", last]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    trace = read_trace(tmp_path / name)
    assert len(trace.requests) == 2
    assert [line.number for line in trace.skipped] == [3 if form is TraceFormat.AZURE else 2]


def test_times_of_the_clock_with_zones_and_without(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    times = ["2024-05-10 00:00:00.0099301", "2024-05-10 02:00:01.009930+02:00"]
    rows = "".join(f"{time},5,5\n" for time in times)
    path.write_text(HEADER[TraceFormat.AZURE] + rows)
    assert [r.at for r in read_trace(path).requests] == [0.0, pytest.approx(1.0)]


def test_the_order_is_that_of_time(tmp_path: Path) -> None:
    entries = [{"timestamp": t, "input_length": t, "output_length": 1} for t in (900, 400, 700)]
    path = written(tmp_path, TraceFormat.MOONCAKE, [json.dumps(entry) for entry in entries])
    trace = read_trace(path)
    assert [(r.at, r.input_len) for r in trace.requests] == [
        (0.0, 400),
        (pytest.approx(0.3), 700),
        (0.5, 900),
    ]
    assert trace.rate == pytest.approx(4.0)


def made(block_len: int, *requests: tuple[int, tuple[int, ...]]) -> Trace:
    traced = [TracedRequest(float(i), n, 10, ids) for i, (n, ids) in enumerate(requests)]
    return Trace("made", tuple(traced), block_len)


def num_common(one: tuple[object, ...], other: tuple[object, ...]) -> int:
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


@pytest.mark.parametrize("kind", list(PromptKind))
def test_equal_ids_are_equal_prefixes(kind: PromptKind) -> None:
    trace = made(8, (20, (1, 2, 3)), (24, (1, 2, 9)), (12, (1, 2)), (30, (1, 2, 3)))
    workload = Workload(Span(1, 1), Span(5, 5), kind)
    prompts = [
        tuple(spec.prompt.split()) if isinstance(spec.prompt, str) else spec.prompt
        for spec in trace_requests(trace, workload)
    ]
    assert [len(prompt) for prompt in prompts] == [20, 24, 12, 30]
    shared = [num_common(prompts[0], prompt) for prompt in prompts[1:]]
    assert shared[1:] == [12, 20]
    assert 16 <= shared[0] < 20  # a word or two may agree by chance
    other = next(trace_requests(trace, Workload(Span(1, 1), Span(5, 5), kind, seed=1)))
    assert other.prompt != next(trace_requests(trace, workload)).prompt


def test_lengths_that_a_trace_lacks_are_the_workloads() -> None:
    trace = Trace("made", (TracedRequest(0.0, 2, 0, text="a b"), TracedRequest(1.0, 2, 3)))
    specs = list(trace_requests(trace, Workload(Span(1, 1), Span(5, 5))))
    assert specs[0].prompt == "a b"
    assert [spec.output_len for spec in specs] == [5, 3]


@pytest.mark.parametrize("factor", [0.01, 0.1, 0.3, 1.0, 1.7])
def test_scaled_lengths_keep_the_blocks(factor: float) -> None:
    trace = made(512, (512 * 13 + 1, tuple(range(14))), (1024, (0, 1)), (3, (7,)))
    scaled = scale_lengths(trace, factor)
    for before, after in zip(trace.requests, scaled.requests, strict=True):
        assert -(-after.input_len // scaled.block_len) == len(before.block_ids)
        assert after.output_len == max(1, round(before.output_len * factor))


def test_rate_and_selection() -> None:
    trace = made(8, (5, ()), (50, ()), (6, ()))
    assert [r.at for r in scale_rate(trace, 4.0).requests] == [0, 0.25, 0.5]
    assert len(first_requests(trace, 2).requests) == 2
    fitting, num_dropped = limit_lengths(trace, 30)
    assert [r.input_len for r in fitting.requests] == [5, 6]
    assert num_dropped == 1


def test_samples_are_what_the_script_makes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_trace_samples.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, timeout=60)
    made_now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in SAMPLES.iterdir()}
    assert shipped.pop("README.md").startswith(b"# Samples")
    assert made_now == shipped


@pytest.mark.parametrize("name", ["mooncake.jsonl", "azure.csv", "burstgpt.csv", "prompts.jsonl"])
def test_samples_can_be_read(name: str) -> None:
    path = SAMPLES / name
    assert detect(name, path.read_text().splitlines()[0]).value == name.partition(".")[0]
    trace = read_trace(path)
    assert len(trace.requests) == 40
    assert trace.num_skipped == 0


def test_recorded_traces() -> None:
    if not RECORDED.is_dir():
        pytest.skip("the recorded traces do not lie beside this checkout")
    azure = read_trace(RECORDED / "azure_2023_conv.csv")
    assert len(azure.requests) == 19_366
    assert azure.rate == pytest.approx(5.53, abs=0.01)
    mooncake = read_trace(RECORDED / "mooncake_conversation.jsonl")
    assert (len(mooncake.requests), mooncake.num_skipped) == (12_031, 0)
    assert mooncake.block_len == MOONCAKE_BLOCK


def test_a_short_trace_is_replayed_with_prefixes_of_its_own() -> None:
    rows = (
        TracedRequest(0.0, 20, 5, (0, 1)),
        TracedRequest(1.0, 20, 5, (0, 2)),
        TracedRequest(3.0, 20, 5, (7,)),
    )
    made = repeated(Trace("t", rows, block_len=10), 7)
    assert [request.at for request in made.requests] == [0.0, 1.0, 3.0, 4.5, 5.5, 7.5, 9.0]
    assert made.rate == pytest.approx(2 / 3, rel=0.01)
    first, second = (
        [id for one in made.requests[i : i + 3] for id in one.block_ids] for i in (0, 3)
    )
    assert [second.index(id) for id in second] == [first.index(id) for id in first]
    assert not set(first) & set(second)
    assert repeated(Trace("t", rows), 2).requests == rows[:2]
    assert repeated(Trace("t", rows[:1]), 5).requests == rows[:1], "nobody knows its rate"
