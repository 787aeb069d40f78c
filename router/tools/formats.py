"""How models write calls: Hermes and Qwen, Mistral, DeepSeek, Llama 3's JSON, Python's syntax.

Each format is a function from the text of a call (or calls) to their names and arguments, or None
for what is no call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

Calls = list[tuple[str, str]]
"""(name, arguments as JSON)"""
Decode = Callable[[str], Calls | None]

MAX_PYTHON_CHARS = 64 << 10


def hermes(text: str) -> Calls | None:
    """`{"name": …, "arguments": {…}}`"""
    return _calls([_loads(text)])


def llama_json(text: str) -> Calls | None:
    """One or several `{"name": …, "parameters": {…}}`, with semicolons between them."""
    values, place = [], 0
    decoder = json.JSONDecoder()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        while place < len(text) and text[place] in "; \n\r\t":
            place += 1
    return _calls(values)


def json_array(text: str) -> Calls | None:
    """`[{"name": …, "parameters": {…}}, …]`"""
    values = _loads(text)
    return _calls(values) if isinstance(values, list) else None


def mistral(text: str) -> Calls | None:
    """An array of calls, or (newer models) `name{…}`, perhaps with `[ARGS]` between."""
    if text.lstrip().startswith("["):
        return json_array(text)
    name, brace, rest = text.partition("{")
    name = name.strip().removesuffix("[ARGS]").strip()
    if not brace or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        return None
    return _calls([{"name": name, "arguments": _loads(brace + rest)}])


_FENCED = re.compile(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


def deepseek(text: str) -> Calls | None:
    """V3.1: the name, a separator, the arguments. V3 and R1: `function`, a separator, the name, and
    the arguments in a fence.
    """
    name, separator, rest = text.partition("<｜tool▁sep｜>")
    if not separator:
        return None
    fenced = _FENCED.fullmatch(rest)
    if fenced is not None and name.strip() == "function":
        name, rest = fenced.groups()
    return _calls([{"name": name.strip(), "arguments": _loads(rest)}])


def pythonic(text: str) -> Calls | None:
    """`[f(a=1, b="x"), g()]`"""
    if len(text) > MAX_PYTHON_CHARS:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        return _calls([_python_call(item) for item in tree.elts])
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> dict[str, Any] | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            return None
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return {"name": ast.unparse(node.func), "arguments": arguments}


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(values: list[Any]) -> Calls | None:
    """None unless all are calls."""
    calls = [_call(value) for value in values]
    return [call for call in calls if call is not None] if calls and all(calls) else None


def _call(value: Any) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        arguments = _loads(arguments)
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        return None
    return value["name"], text
