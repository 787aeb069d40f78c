"""Values of every message type, made from the very annotations that the codec checks."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import annotated_types
from hypothesis import strategies as st

from wire.geometry import WIRE_DTYPES, WireDType
from wire.layout import DTYPE_BYTES, DType
from wire.logprobs import Row, TokenLogprobs, pack

MAX_ITEMS = 3  # long tuples are tested on their own

_logprobs = st.floats(max_value=0, width=32, allow_nan=False)
_rows = st.builds(
    TokenLogprobs,
    _logprobs,
    st.integers(1, (1 << 32) - 1),
    st.lists(st.tuples(st.integers(0, (1 << 32) - 1), _logprobs), max_size=MAX_ITEMS).map(tuple),
)


def of_message(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of the message dataclass `kind`, every field within its bounds."""
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{field.name: _of(hints[field.name]) for field in fields(kind)})


def _of(hint: Any) -> st.SearchStrategy[Any]:
    if hint == DType:
        return st.sampled_from(sorted(DTYPE_BYTES))
    if hint == WireDType:
        return st.sampled_from(WIRE_DTYPES)
    if hint == Row:
        return st.just(b"") | st.builds(pack, _rows)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(args[0], _bounds(args[1:]))
    if origin in (Union, UnionType):
        return st.one_of([_of(arg) for arg in args])
    if hint is NoneType:
        return st.none()
    if is_dataclass(hint):
        return of_message(hint)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    return _bounded(hint, {})


def _bounds(annotations: tuple[Any, ...]) -> dict[str, Any]:
    names = {
        annotated_types.Ge: "ge",
        annotated_types.Gt: "gt",
        annotated_types.Le: "le",
        annotated_types.Lt: "lt",
        annotated_types.MinLen: "min_length",
        annotated_types.MaxLen: "max_length",
    }
    return {
        names[type(item)]: getattr(item, names[type(item)])
        for annotation in annotations
        for item in annotation.metadata
        if type(item) in names
    }


def _bounded(kind: Any, bounds: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind is int:
        return st.integers(bounds["ge"], bounds["lt"] - 1)
    if kind is float:
        low, exclusive = bounds.get("ge", bounds.get("gt")), "gt" in bounds
        return st.floats(low, bounds["le"], exclude_min=exclusive, allow_nan=False)
    if kind is bool:
        return st.booleans()
    sizes = {
        "min_size": bounds.get("min_length", 0),
        "max_size": min(bounds.get("max_length", 0), 32),
    }
    if kind is str:
        return st.text(st.characters(codec="utf-8"), **sizes)
    if kind is bytes:
        return st.binary(**sizes)
    item = get_args(kind)
    if get_origin(kind) is tuple:
        return st.lists(_of(item[0]), max_size=MAX_ITEMS).map(tuple)
    assert get_origin(kind) is dict, f"no strategy for {kind}"
    return st.dictionaries(_of(item[0]), _of(item[1]), max_size=MAX_ITEMS)
