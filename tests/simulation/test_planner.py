"""Plans: the right split where it is known, one more node, limits that nothing keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from baton import serve
from baton.bundled_model import DEFAULT_MODEL
from baton.cli import main
from baton.device_names import device_text
from baton.plan import plan_lines
from baton.simulation.planner import Candidate, Plan, Planner, Point, larger, splits_of
from baton.simulation.setup import Setup, Split
from engine.config import EngineConfig
from node.machine import look
from tuner.goodput import Attainment, Slo
from tuner.latency import LatencyModel
from tuner.profile import FitError, Profile, load_profile, save_profile
from tuner.report import summarize
from tuner.trace import Trace, TracedRequest
from wire.layout import KVLayout

MODEL = LatencyModel((0.010, 2e-4, 0.0), (0.008, 1e-6, 1e-3), (0.001, 1e-10))
LAYOUT = KVLayout(2, 2, 16, 16, "float32")
ENGINE = EngineConfig(num_blocks=4000, max_model_len=4096, max_num_seqs=32)
SETUP = Setup(Split(mixed=1), ENGINE, LAYOUT, MODEL)


def steady(number: int, input_len: int, output_len: int) -> Trace:
    return Trace("made", tuple(TracedRequest(i / 4, input_len, output_len) for i in range(number)))


def test_every_split_is_tried_once() -> None:
    assert splits_of(1) == [Split(mixed=1)]
    assert splits_of(3) == [Split(mixed=3), Split(1, 2), Split(2, 1)]
    assert larger(Split(1, 2)) == [Split(2, 2), Split(1, 3)]
    assert larger(Split(mixed=3)) == [Split(mixed=4)]


def test_long_prompts_want_prefill_nodes_and_long_answers_decode_nodes() -> None:
    prompts = Planner(SETUP, steady(60, 1500, 3), Slo(1.0, 0.025), 0.9)
    answers = Planner(SETUP, steady(60, 60, 60), Slo(1.0, 0.012), 0.9)
    rates = [
        [planner.candidate(split, 512).rate for split in (Split(2, 1), Split(1, 2))]
        for planner in (prompts, answers)
    ]
    assert rates[0][0] > 1.5 * rates[0][1]
    assert rates[1][1] > 1.5 * rates[1][0]


def test_loose_limits_leave_nodes_colocated() -> None:
    plan = Planner(SETUP, steady(40, 300, 30), Slo(5.0, 1.0), 0.9).plan(2, [512])
    assert plan.best.split == Split(mixed=2)
    text = "\n".join(plan_lines(plan))
    assert "best alternative (1 prefill + 1 decode" in text
    assert "baton serve MODEL --mixed 2 --max-num-batched-tokens 512" in text


def test_long_prompts_among_chats_want_nodes_of_their_own() -> None:
    """Neither all handed over nor all colocated: what the choice per request is for."""
    chats = [TracedRequest(0.05 + i / 3, 50, 30) for i in range(90)]
    longs = [TracedRequest(i * 3.0, 3000, 8) for i in range(10)]
    mixed = Trace("made", tuple(sorted([*chats, *longs], key=lambda request: request.at)))
    limits = {50: Slo(0.10, 0.025), 3000: Slo(2.5, 0.05)}
    planner = Planner(
        SETUP, mixed, limits[50], 0.9, slo_of=lambda record: limits[record.prompt_tokens]
    )
    plan = planner.plan(2, [512])
    assert plan.best.split == Split(prefill=1, decode=1)
    assert "--prefill 1 --decode 1" in "\n".join(plan_lines(plan))
    assert plan.best.rate > 1.5 * max(c.rate for c in plan.candidates if c.split.mixed)


def test_every_token_budget_is_tried() -> None:
    """A chunk per 64 tokens pays the step's constant 16 times for a prompt."""
    plan = Planner(SETUP, steady(40, 1000, 30), Slo(5.0, 0.1), 0.9).plan(1, [64, 2048])
    assert [candidate.token_budget for candidate in plan.candidates] == [64, 2048]
    assert plan.best.token_budget == 2048
    assert plan.best.rate > plan.candidates[0].rate


def test_further_budgets_are_tried_with_the_best_of_either_kind() -> None:
    planner = Planner(SETUP, steady(40, 1000, 3), Slo(0.6, 0.1), 0.9)
    plan = planner.plan(3, [64], further=(128, 2048))
    tried: dict[Split, list[int]] = {}
    for candidate in plan.candidates:
        tried.setdefault(candidate.split, []).append(candidate.token_budget)
    more = [split for split, budgets in tried.items() if budgets == [64, 128, 2048]]
    assert Split(mixed=3) in more
    assert len(more) == 2
    assert [64] in tried.values()
    assert plan.best.token_budget == 2048


@pytest.mark.parametrize(("ttft", "tpot", "word"), [(0.6, 0.95, "TTFT"), (0.95, 0.6, "TPOT")])
def test_why_says_how_the_other_kind_fails(ttft: float, tpot: float, word: str) -> None:
    """At the lowest rate that it does not carry, whatever comes after that."""
    none, both = summarize([]), Attainment(1.0, 1.0, 1.0, 1.0)
    points = tuple(
        Point(rate, attained, none, none, {})
        for rate, attained in (
            (1.0, both),
            (2.0, Attainment(0.55, ttft, tpot, 1.0)),
            (4.0, Attainment(0.0, 0.0, 0.0, 1.0)),
        )
    )
    best = Candidate(Split(1, 1), 512, 2.0, points)
    other = Candidate(Split(mixed=2), 512, 1.0, points)
    plan = Plan(best, (other, best), (), "", Slo(1.0, 0.1), 0.9)
    text = "\n".join(plan_lines(plan))
    assert (
        f"2.00 times the goodput of the best alternative ({other}), which fails by {word}" in text
    )


def test_limits_that_nothing_keeps() -> None:
    plan = Planner(SETUP, steady(20, 300, 30), Slo(0.001, 0.1), 0.9).plan(2, [512])
    assert not plan.possible
    text = "\n".join(plan_lines(plan))
    assert "impossible" in text
    assert "90th percentiles are 7" in text  # 0.07 s of prefill
    assert plan.one_more == ()


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    device = device_text(look().cpu_model, 1, "float32")
    made = Profile("m", "abc", device, 4096, LAYOUT, MODEL, {"prefill": FitError(1, 0.0, 0.0)})
    save_profile(made, tmp_path / "profile.json")
    return tmp_path / "profile.json"


def plan_command(profile: Path, *flags: str) -> int:
    limits = ["--nodes", "2", "--ttft", "900", "--tpot", "90", "--kv-memory", "16m"]
    few = ["--num-requests", "20", "--tokens-per-step", "512"]
    return main(["plan", "--profile", str(profile), *limits, *few, *flags])


def test_the_command(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = profile.with_name("plan.json")
    assert plan_command(profile, "--json", str(out)) == 0
    text = capsys.readouterr().out
    for word in ("plan ", "goodput ", "why ", "bottleneck ", "one more ", "1 prefill + 1 decode"):
        assert word in text
    plan = json.loads(out.read_text())
    assert plan["schema"] == "baton.plan/1"
    assert plan["possible"]
    assert len(plan["candidates"]) == 2
    best = max(plan["candidates"], key=lambda candidate: candidate["rate"])
    assert plan["best"]["split"] == best["split"]
    command = re.search(r"^serve +baton (serve .*)$", text, re.MULTILINE)
    assert command is not None
    assert "--threads 1 --max-num-seqs 64 --kv-memory 16777216 --max-model-len 4096" in command[1]
    told = serve.make_parser().parse_args(command[1].split()[1:])
    assert (told.threads, told.max_num_batched_tokens) == (1, 512), "serve knows all of these flags"


def test_a_run_too_short_for_a_queue_is_told(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--ttft", "5000", "--input-len", "32", "--output-len", "4"]
    assert plan_command(profile, *short) == 0
    assert "--num-requests" in capsys.readouterr().out
    assert plan_command(profile, "--ttft", "250", "--num-requests", "60") == 0
    assert "--num-requests" not in capsys.readouterr().out


def test_the_command_reads_traces(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = {"input_length": 600, "output_length": 9}
    lines = [json.dumps({"timestamp": i * 300, **request}) for i in range(9)]
    long = '{"timestamp": 1, "input_length": 99999, "output_length": 9}'
    trace = profile.with_name("trace.jsonl")
    trace.write_text("\n".join([*lines, "{", long]))
    assert plan_command(profile, "--trace", str(trace), "--length-scale", "0.5") == 0
    told = capsys.readouterr().err
    assert "1 lines skipped (line 10: " in told
    assert "1 requests are longer" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attainment", "1.5"], "--attainment must be"),
        (["--kv-memory", "1"], "holds no block"),
        (["--input-len", "9000"], "no request fits"),
        (["--ttft", "0"], "must be above 0"),
        (["--device", "another"], "the profile was made on"),
        (["--model", str(DEFAULT_MODEL)], "the profile is of model m"),
    ],
)
def test_the_command_refuses(
    profile: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert plan_command(profile, *flags) == 1
    assert message in capsys.readouterr().err


def test_another_machines_profile_is_refused_unless_it_is_meant(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The profile's own text is what `--device` takes."""
    save_profile(replace(load_profile(profile), device="a GPU, 1 threads, float16"), profile)
    assert plan_command(profile) == 1
    assert "the profile was made on 'a GPU, 1 threads, float16'" in capsys.readouterr().err
    assert plan_command(profile, "--device", "a GPU, 1 threads, float16") == 0


@pytest.mark.parametrize("ttft", ["900", "0.1"])
def test_the_command_draws(profile: Path, capsys: pytest.CaptureFixture[str], ttft: str) -> None:
    """Possible or not."""
    out = profile.with_name("plan.html")
    assert plan_command(profile, "--ttft", ttft, "--html", str(out)) == 0
    page = out.read_text()
    assert page.count("<svg") == 4
    assert capsys.readouterr().out.splitlines()[0] in page
    assert "1 prefill + 1 decode" in page
    assert "prefill-0" in page or "mixed-0" in page  # who is busy


def test_prompt_files_tell_no_times(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profile.with_name("prompts.txt")
    path.write_text("one\ntwo\n")
    assert plan_command(profile, "--trace", str(path)) == 1
    assert "tells no times" in capsys.readouterr().err


def test_memory_can_be_what_lacks() -> None:
    little = replace(SETUP, engine=replace(ENGINE, num_blocks=70))
    load, slo = steady(60, 900, 30), Slo(2.0, 0.05)
    rates = [
        Planner(setup, load, slo, 0.9).candidate(Split(1, 1), 512).rate for setup in (little, SETUP)
    ]
    assert rates[0] < 0.8 * rates[1]
