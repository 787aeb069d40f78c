"""Beam search as vLLM's API has it: what goes with it, and what it asks of the nodes.

`use_beam_search` makes `n` (completions: `best_of`, if that is given) the number of beams, and the
best `n` hypotheses the answer, best first. Nothing is drawn and nothing is shown before the end.
"""

from __future__ import annotations

from router.api import CompletionBody, GenerationBody
from router.errors import bad_request
from wire.types import MAX_BEAM_WIDTH, BeamParams, EarlyStopping

# Parameters that mean nothing to a search, with the values (beside null) that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "stop": ([],),
    "stop_token_ids": ([],),
    "stream": (False,),
    "temperature": (0, 1),  # neither changes the order of tokens
    "top_k": (0, -1),
    "top_p": (1,),
}
_EARLY: dict[object, EarlyStopping] = {
    None: EarlyStopping.HEURISTIC,
    False: EarlyStopping.HEURISTIC,
    True: EarlyStopping.WHEN_FULL,
    "never": EarlyStopping.NEVER,
}


def beam_params(body: GenerationBody) -> BeamParams | None:
    """The search that is asked for. Raises ApiError for what does not go together."""
    if not body.use_beam_search:
        _check_unused(body)
        return None
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and not any(value is n or _same(value, n) for n in neutral):
            raise bad_request(f"`{name}` is not available with `use_beam_search`.", name)
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    return BeamParams(_width(body), penalty, _EARLY[body.early_stopping])


def _same(value: object, neutral: object) -> bool:
    """Equal, and no number that passes for a boolean: `logprobs` may be 0 or false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _width(body: GenerationBody) -> int:
    best_of = body.best_of if isinstance(body, CompletionBody) else None
    width = best_of or body.n or 1
    if width > MAX_BEAM_WIDTH:
        raise bad_request(
            f"A beam search has at most {MAX_BEAM_WIDTH} beams.", "best_of" if best_of else "n"
        )
    return width


def _check_unused(body: GenerationBody) -> None:
    for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
        if getattr(body, name) not in (None, neutral):
            raise bad_request(f"`{name}` is only allowed with `use_beam_search`.", name)
