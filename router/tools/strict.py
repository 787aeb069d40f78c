"""Calls that need not be, but keep to their schemas if they are: tools with `strict` in `auto`.

The text is free up to the marker of a call; behind it the call's JSON has to fit.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from router.api_tools import Tool
from router.structural_tags import with_whitespace
from router.tools.use import calls_schema

_LARK = r"""%llguidance {{}}
start: call* TEXT
begin[lazy]: TEXT {begin}
call: begin SPACE %json {calls} SPACE {end}
TEXT: /(.|\n)*/
SPACE: /[ \n]{{0,4}}/
"""


def strict_grammar(tools: list[Tool], begin: str, end: str, whitespace: str) -> str:
    """For calls as Hermes writes them. Tools that are not strict take any object."""
    calls = with_whitespace(calls_schema(_loosened(tools), "arguments"), whitespace, "tools")
    lark = _LARK.format(begin=json.dumps(begin), end=json.dumps(end), calls=json.dumps(calls))
    return LLMatcher.grammar_from_lark(lark)


def _loosened(tools: list[Tool]) -> list[Tool]:
    anything: dict[str, Any] = {"type": "object"}
    return [
        tool
        if tool.function.strict
        else Tool(
            type="function",
            function=tool.function.model_copy(update={"parameters": anything}),
        )
        for tool in tools
    ]
