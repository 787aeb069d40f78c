"""Speculation on this machine: what it gains where it can, and what it costs where it cannot.

    oracle_b1, draft_b1, ngram_b1   tokens per second with drafts over without, one request
    draft_vs_ideal                  draft_b1 over the best fixed length, by its measured acceptance
                                    and step costs
    b16_worst                       while 16 requests run, each that ends replaced at once; the
                                    least of all drafters
    b16_closed_worst                a batch of 16 from its first step to its last, the least again:
                                    its end is that of one straggler, who may have nothing to draft.
                                    Until 2026-11-21 this was `b16_worst`
    random_worst                    noise, one request; the least again
    ngram_overhead_ms_b16           a drafting step's time outside the model that drafts add
    n8_...                          what `n = 8` costs beside one choice (parallel_sampling.py)
    coupling                        same noise against classic rejection (speculation/coupling.py)

Medians of pairs in turn, so a busy machine slows both. Outputs are compared each time: drafts must
not change them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton.bundled_model import BUNDLED
from benchmarks.make_model import make_model
from benchmarks.parallel_sampling import measure_parallel_sampling
from benchmarks.speculation import coupling
from benchmarks.speculation.rig import Job, Oracle, Rig, Run, Stream, median, ngram, speedups
from benchmarks.speculation.texts import CODE, REPEATING, noise
from engine.drafting.control import LEARNING_STEPS
from engine.drafting.draft_model import DraftModel
from engine.loader import load_model
from engine.plan import RequestProgress, StepPlan

MOST = 5  # tokens of a draft
PAIRS = 7
NUM_TOKENS = 192
TARGET, DRAFT = BUNDLED / "baton-7m", BUNDLED / "baton-draft"


class Bundled:
    """The bundled model, the bundled drafter, and prompts."""

    def __init__(self, num_pairs: int) -> None:
        self.rig = Rig(TARGET)
        self._draft: DraftModel = self.rig.draft_model(DRAFT)
        self._num_pairs = num_pairs
        tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
        self.code = [tokenizer.encode(text).ids for text in CODE]
        self.repeating = tokenizer.encode(REPEATING).ids
        self._vocab_size = self.rig.loaded.vocab_size

    def draft(self) -> dict[str, float]:
        """Code, one request at a time."""
        jobs = [Job([prompt], NUM_TOKENS) for prompt in self.code]
        ratios, runs = speedups(
            self.rig, jobs, self.rig.speculation(self._draft, MOST), self._num_pairs
        )
        told("draft, code", ratios, runs)
        ideal = max(self._fixed(jobs, length) for length in range(1, MOST + 1))
        return {"draft_b1": median(ratios), "draft_vs_ideal": median(ratios) / ideal}

    def _fixed(self, jobs: Sequence[Job], length: int) -> float:
        """What drafts of one length gain by their acceptance and the medians of their steps."""
        speculation = self.rig.speculation(self._draft, length, adaptive=False)
        pairs = [(self.rig.run(job), self.rig.run(job, speculation)) for job in [*jobs, *jobs]][1:]
        plain_s = median([seconds for plain, _ in pairs for seconds in plain.step_s])
        step_s = median([seconds for _, run in pairs for seconds in run.step_s])
        draft_s = median([seconds for _, run in pairs for seconds in run.draft_s])
        tokens = sum(run.num_tokens for _, run in pairs) / sum(len(r.step_s) for _, r in pairs)
        gain = tokens * plain_s / (step_s + draft_s)
        print(
            f"  length {length}: {tokens:.2f} tokens per step, step {1e3 * plain_s:.2f} → "
            f"{1e3 * step_s:.2f} ms and {1e3 * draft_s:.2f} ms to draft: {gain:.2f}"
        )
        return gain

    def ngram(self) -> float:
        """Text that repeats itself."""
        job = Job([self.repeating], NUM_TOKENS)
        speculation = self.rig.speculation(ngram(), MOST)
        ratios, runs = speedups(self.rig, [job], speculation, self._num_pairs)
        told("ngram, repeating text", ratios, runs)
        return median(ratios)

    def sixteen(self) -> dict[str, float]:
        """Code, 16 requests at once; the worse of two drafters."""
        stream = Stream(self.code, NUM_TOKENS, 0.7, num_seats=16, num_warm=800, num_tokens=3200)
        prompts = [self.code[number % len(self.code)] + [10 + number] for number in range(16)]
        return {
            "b16_worst": self._worst("16 requests at all times", [stream]),
            "b16_closed_worst": self._worst("16 requests", [Job(prompts, NUM_TOKENS, 0.7)]),
        }

    def random(self) -> float:
        """Noise, and noise for an answer; the worse of two drafters."""
        prompts = [noise(seed, 200, self._vocab_size) for seed in range(3)]
        return self._worst("noise", [Job([prompt], NUM_TOKENS, 2.0) for prompt in prompts])

    def _worst(self, name: str, jobs: Sequence[Job | Stream]) -> float:
        medians = []
        for drafter in (ngram(), self._draft):
            speculation = self.rig.speculation(drafter, MOST)
            ratios, runs = speedups(self.rig, jobs, speculation, self._num_pairs)
            told(f"{drafter.method}, {name}", ratios, runs)
            medians.append(median(ratios))
        return min(medians)

    def coupling(self) -> dict[str, dict[str, float]]:
        """By temperature, on the code prompts as the model completes them."""
        texts = [
            [*job.prompts[0], *self.rig.run(job).outputs[0]]
            for job in (Job([prompt], 64, 0.7) for prompt in self.code)
        ]
        draft = load_model(DRAFT)
        found = {}
        for temperature in (0.5, 0.7, 1.0):
            it = coupling.measure(self.rig.loaded, draft, texts, temperature)
            found[str(temperature)] = {
                "classic": round(it.classic, 3),
                "coupled": round(it.coupled, 3),
            }
            print(
                f"temperature {temperature}: rejection would accept {it.classic:.3f}, "
                f"the same noise accepts {it.coupled:.3f}"
            )
        return found


def told(name: str, ratios: Sequence[float], runs: Sequence[Run]) -> None:
    drafted = sum(run.num_drafted for run in runs)
    accepted = sum(run.num_accepted for run in runs)
    print(
        f"{name}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{accepted} of {drafted} draft tokens right"
    )


def oracle(folder: Path, num_pairs: int) -> float:
    """The 88 M random model and a drafter that is right in eight of ten tokens."""
    rig = Rig(make_model(folder / "m88"))
    vocab_size = rig.loaded.vocab_size
    job = Job([noise(1, 64, vocab_size)], NUM_TOKENS // 2)
    drafter = Oracle(rig.run(job).outputs, 0.8, vocab_size)
    ratios, runs = speedups(rig, [job], rig.speculation(drafter, 8), num_pairs)
    told("oracle, 88 M", ratios, runs)
    return median(ratios)


@dataclass(slots=True)
class TimedStep:
    """What speculation took of one step."""

    seconds: float
    num_requests: int
    num_drafts: int


class Timed:
    """Speculation around steps, timed from outside."""

    def __init__(self, rig: Rig) -> None:
        self._speculation = rig.speculation(ngram(), MOST, adaptive=True)
        self.steps: list[TimedStep] = []

    def propose(self, requests: Sequence[Any]) -> Any:
        start = time.perf_counter()
        drafts = self._speculation.propose(requests)
        seconds = time.perf_counter() - start
        self.steps.append(TimedStep(seconds, len(requests), len(drafts)))
        return drafts

    def committed(self, plan: StepPlan, progress: Sequence[RequestProgress]) -> Any:
        start = time.perf_counter()
        counts = self._speculation.committed(plan, progress)
        self.steps[-1].seconds += time.perf_counter() - start
        return counts


def overhead_ms(rig: Rig, text: Sequence[int], *, context: int = 1000) -> float:
    """Of steps in which 16 requests run, whose texts repeat, and any of them is drafted for."""
    repeated = [*text] * (1 + context // len(text))
    prompts = [repeated[number : context + number] for number in range(16)]
    timed: Any = Timed(rig)
    rig.run(Job(prompts, 160), timed)
    learned = timed.steps[1 + LEARNING_STEPS :]
    return 1e3 * median([it.seconds for it in learned if it.num_requests == 16 and it.num_drafts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few pairs: to see that it works")
    quick: bool = parser.parse_args().quick
    num_pairs = 1 if quick else PAIRS
    bundled = Bundled(num_pairs)
    figures: dict[str, Any] = {"coupling": bundled.coupling()}
    figures |= bundled.draft()
    figures["ngram_b1"] = bundled.ngram()
    figures |= bundled.sixteen()
    figures["random_worst"] = bundled.random()
    figures["ngram_overhead_ms_b16"] = overhead_ms(bundled.rig, bundled.repeating)
    with tempfile.TemporaryDirectory() as folder:
        figures["oracle_b1"] = oracle(Path(folder) / "oracle", num_pairs)
        figures |= measure_parallel_sampling(Path(folder), quick)
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
