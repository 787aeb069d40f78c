"""What an output must look like: a grammar, as a text in the form of the llguidance library.

The router makes the text and checks it, nodes compile it; here is what both must do alike. Its
state is never shipped: it is a function of the output tokens, which every attempt has.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_CHARS = 64 << 10  # as in the type's annotation; an empty text is no grammar

NOT_SATISFIABLE = "nothing can satisfy it"


def parser_limits() -> LLParserLimits:
    """Bounds of time and memory; messages without the parser's state."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,  # about 20 ms
        step_lexer_fuel=200_000,  # about 15 ms
        step_max_items=50_000,
        max_lexer_states=50_000,  # 1 to 2 kB each
        max_grammar_size=250_000,
        verbose_errors=False,
    )


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """At the beginning of an output. It never raises: ask `mistake_of` it."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())


def mistake_of(matcher: LLMatcher) -> str | None:
    """Why a new matcher can be used for nothing, in a few words; None if it can."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return _first_lines(matcher.get_error())
    if matcher.is_stopped() and not matcher.is_accepting():
        return NOT_SATISFIABLE
    return None


class GrammarChecker:
    """Tells whether a grammar can be compiled, without a model's tokenizer."""

    def __init__(self) -> None:
        self._bytes = LLTokenizer("byte")

    def mistake(self, grammar: str) -> str | None:
        """Why nodes will not take `grammar`; None if they will."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            return f"it has more than {MAX_GRAMMAR_CHARS} characters in the grammar's own form"
        return mistake_of(new_matcher(self._bytes, grammar))


def _first_lines(error: str) -> str:
    """The library shows the whole line at fault, perhaps all of a client's text."""
    if "NoExtension" in error:
        return NOT_SATISFIABLE
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return "; ".join(lines[:4])[:300]
