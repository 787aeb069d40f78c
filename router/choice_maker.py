"""Makes the choices of a request: each with its dispatch, its text, its trace."""

from __future__ import annotations

from collections.abc import Callable

from router.asked import Asked, Served
from router.assignment import Assignment
from router.checks import check_num_pairs
from router.choice import Choice, Listener
from router.choice_text import ChoiceText, TextRules
from router.dispatch import Dispatch, DispatchLimits
from router.echo import Echo
from router.metrics import RouterMetrics
from router.placement import Placer
from router.trace import ChoiceTrace
from router.work import Prompt, Work
from telemetry import metrics as names
from telemetry.timeline import Timeline


class ChoiceMaker:
    """Knows what all choices of one router share.

    Args:
        placer: chooses their nodes.
    """

    def __init__(
        self,
        placer: Placer,
        limits: DispatchLimits,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._placer = placer
        self._limits = limits
        self._metrics = metrics
        self._clock = clock

    def of(self, asked: Asked, listener: Listener) -> list[Choice]:
        """All choices of each prompt, in the order of their indices. Raises ApiError."""
        params, info = asked.params, asked.served.info
        self._metrics.for_model(info.name).observe(names.REQUEST_N, params.n)
        choices: list[Choice] = []
        for ready in asked.prompts:
            prompt = Prompt(tuple(ready.tokens), params.cache_salt)
            for number in range(params.num_choices):
                sampling = params.sampling(number, len(ready.tokens), info.max_model_len)
                check_num_pairs(len(ready.tokens), sampling)
                work = Work(f"{asked.id}-{len(choices)}", prompt, sampling)
                choices.append(self._choice(len(choices), work, ready.echo, asked, listener))
        return choices

    def _choice(
        self, index: int, work: Work, echo: Echo | None, asked: Asked, listener: Listener
    ) -> Choice:
        params = asked.params
        detokenizer = asked.served.tokenizer.detokenizer(
            work.prompt.tokens, params.skip_special_tokens
        )
        return Choice(
            index=index,
            work=work,
            dispatch=self._dispatch(work),
            text=ChoiceText(detokenizer, params.text_rules),
            trace=ChoiceTrace(work.request, index, work.num_tokens, asked.timeline.copy()),
            listener=listener,
            metrics=self._metrics.for_model(asked.served.info.name),
            assigned=Assignment(work),
            echo=echo,
            priority=params.body.priority or 0,
            parser=params.reading.make_parser(),
        )

    def plain(
        self,
        work: Work,
        served: Served,
        timeline: Timeline,
        listener: Listener,
        *,
        index: int,
        priority: int,
    ) -> Choice:
        """A choice without text."""
        return Choice(
            index=index,
            work=work,
            dispatch=self._dispatch(work),
            text=ChoiceText(served.tokenizer.detokenizer((), False), TextRules()),
            trace=ChoiceTrace(work.request, index, work.num_tokens, timeline.copy()),
            listener=listener,
            metrics=self._metrics.for_model(served.info.name),
            assigned=Assignment(work),
            priority=priority,
        )

    def _dispatch(self, work: Work) -> Dispatch:
        return Dispatch(work, self._placer, self._limits, self._clock())
