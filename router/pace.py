"""How fast the fleet is, as far as a choice between two ways of serving needs to know it.

A planner has measured formulas (`tuner.latency`). A router learns them from what its requests tell
on their way: prompts from prefill nodes' timings, handoffs from their records, streams from their
ends. What is older counts less and less.

Relative errors weigh quick samples most. So a formula follows at once what becomes quicker, and
would need hundreds of samples to follow a link that becomes a hundred times slower: some in a row
that are far slower than it says are taken for the truth, and all before them is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuner.latency import Fit, LatencyModel, Sample, StepWork, predict, prefill_sample

CHUNK = 512  # tokens of a prompt per step, unless somebody knows better
STREAM_S = 4.0  # how long a stream lasts, while none has ended yet
_MEMORY = 100.0  # samples after which one counts a third
_PRIOR_TOKENS = (16, 128, 1024)  # where the first prompt's pace is believed before others are seen
_FOLLOWS = 0.1  # of a new value in a running mean
_FAR_SLOWER = 3.0  # times what was predicted
_BELIEVED = 5  # so many of those in a row


@dataclass(frozen=True, slots=True)
class Pace:
    """Formulas in seconds.

    Args:
        model: of steps.
        handoff: constant and slope over bytes of what a handoff adds between a request's first two
            tokens; the bytes that left during the prefill cost nothing.
        stream_s: how long a stream lasts: what delays it is spread over that.
        chunk: most tokens of a prompt in a step.
    """

    model: LatencyModel
    handoff: tuple[float, float]
    stream_s: float = STREAM_S
    chunk: int = CHUNK

    def prompt_s(self, num_cached: int, num_tokens: int) -> float:
        """A prompt that is alone, of which so many tokens are cached."""
        a, b, c = self.model.prefill
        missing = num_tokens - num_cached
        num_steps = -(-missing // self.chunk)
        return a * num_steps + b * missing + c * (num_tokens**2 - num_cached**2)

    def between_s(self, num_cached: int, num_tokens: int, streams: StepWork) -> float:
        """The same prompt between the tokens of streams."""
        num_steps = -(-(num_tokens - num_cached) // self.chunk)
        return self.prompt_s(num_cached, num_tokens) + num_steps * self._beside_s(streams)

    def _beside_s(self, streams: StepWork) -> float:
        """What streams add to a step that computes a prompt."""
        together = StepWork(1, 0, streams.decode_batch, streams.decode_context)
        return self.model.step_s(together) - self.model.step_s(StepWork(1))

    def queue_s(self, num_tokens: int, streams: StepWork) -> float:
        """Prompts that wait, each of them short beside the context that would make it slower."""
        a, b, _ = self.model.prefill
        num_steps = -(-num_tokens // self.chunk)
        return (a + self._beside_s(streams)) * num_steps + b * num_tokens

    def token_s(self, streams: StepWork) -> float:
        """A step of streams and one more."""
        batch, context = streams.decode_batch + 1, streams.decode_context
        return self.model.step_s(StepWork(decode_batch=batch, decode_context=context))

    def handoff_s(self, num_bytes: int) -> float:
        return self.handoff[0] + self.handoff[1] * num_bytes


class Learned:
    """A formula that follows its samples, whether they become quicker or slower."""

    def __init__(self, size: int) -> None:
        self._fit = Fit(size, _MEMORY)
        self._solved: tuple[float, ...] | None = None
        self._slower: list[Sample] = []  # the last in a row that were

    @property
    def num_samples(self) -> int:
        return self._fit.num_samples

    def solve(self) -> tuple[float, ...]:
        """The coefficients; ValueError without a sample."""
        if self._solved is None:
            self._solved = self._fit.solve()
        return self._solved

    def add(self, sample: Sample) -> None:
        if self._is_far_slower(sample):
            self._slower.append(sample)
        else:
            self._slower.clear()
        if len(self._slower) < _BELIEVED:
            self._take(sample)
            return
        self._fit = Fit(self._fit.size, _MEMORY)
        for believed in self._slower:
            self._take(believed)
        self._slower.clear()

    def _is_far_slower(self, sample: Sample) -> bool:
        if not self.num_samples:
            return False
        return sample.seconds > _FAR_SLOWER * predict(self.solve(), sample.variables)

    def _take(self, sample: Sample) -> None:
        self._fit.add(sample)
        self._solved = None


class LivePace:
    """What one router has seen of its requests."""

    learns = True

    def __init__(self) -> None:
        self._prefill = Learned(3)
        self._handoff = Learned(2)
        self._token_s: float | None = None
        self._stream_s = STREAM_S
        self._pace: Pace | None = None
        self._stale = False

    def prefilled(self, num_cached: int, num_tokens: int, seconds: float) -> None:
        """A prefill node has computed what it lacked of a prompt."""
        work = StepWork(num_tokens - num_cached, num_tokens**2 - num_cached**2)
        if work.prefill_tokens <= 0 or seconds <= 0:
            return
        if not self._prefill.num_samples:
            per_token = seconds / work.prefill_tokens
            for tokens in _PRIOR_TOKENS:  # else one length could be taken for a constant
                prior = StepWork(tokens, tokens**2)
                self._prefill.add(prefill_sample(prior, tokens * per_token))
        self._prefill.add(prefill_sample(work, seconds))
        self._stale = True

    def handed_over(self, num_bytes: int, seconds: float) -> None:
        """A handoff made its request's second token wait for so long."""
        self._handoff.add(Sample((1.0, num_bytes), seconds))
        self._stale = True

    def streamed(self, num_tokens: int, seconds: float | None) -> None:
        """A stream has ended: tokens after its first one, and the time they took."""
        if num_tokens <= 0 or not seconds:
            return
        token_s = seconds / num_tokens
        self._token_s = _followed(self._token_s, token_s)
        self._stream_s = _followed(self._stream_s, seconds)
        self._stale = True

    @property
    def pace(self) -> Pace | None:
        """None until a prompt has been computed, a handoff been made and a stream has ended."""
        if self._stale:
            self._stale = False
            self._pace = self._solved()
        return self._pace

    def _solved(self) -> Pace | None:
        fits = (self._prefill, self._handoff)
        if self._token_s is None or not all(fit.num_samples for fit in fits):
            return None
        a, b, c = self._prefill.solve()
        constant, slope = self._handoff.solve()
        model = LatencyModel((a, b, c), (self._token_s, 0.0, 0.0), (constant, slope))
        return Pace(model, (constant, slope), self._stream_s)


def _followed(mean: float | None, new: float) -> float:
    return new if mean is None else mean + _FOLLOWS * (new - mean)
