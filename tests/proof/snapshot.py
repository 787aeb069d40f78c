"""Live objects to one hashable value and back, so that a state can be compared, kept and revisited.

Nothing is listed by hand: every field of every object that can be reached is part of the value, so
a field that somebody adds tomorrow is part of the state as well. Two references to one object stay
two references to one object (the second one is frozen as a number).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable
from enum import Enum
from functools import cache, partial
from itertools import count
from types import FunctionType, MethodType
from typing import Any

import numpy as np

from kvtransfer.transfer_meter import TransferMeter
from kvtransfer.transport import TransferStats

Frozen = Hashable

_VALUES = (int, float, str, bytes, type(None), Enum, type, FunctionType)
_TELEMETRY = (TransferStats, TransferMeter)  # decides nothing
_MADE_EMPTY = (*_TELEMETRY, dict, OrderedDict, Counter, defaultdict, list, deque, set, bytearray)


class _Again:
    """Tags a reference to an object that was frozen before."""


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    """The slots of a class; of others, the instance's `__dict__` is looked at."""
    slots = [getattr(cls, "__slots__", ()) for cls in kind.__mro__]
    return tuple(name for names in slots for name in names if name != "__weakref__")


@cache
def _is_immutable(kind: Any) -> bool:
    params = getattr(kind, "__dataclass_params__", None)
    return issubclass(kind, _VALUES) or bool(params and params.frozen)


def freeze(root: object) -> Frozen:
    """Everything that can be reached from `root`."""
    seen: dict[int, int] = {}

    def walk(x: Any) -> Any:
        kind: Any = type(x)
        if _is_immutable(kind) and _is_hashable(x):
            return x
        if kind is tuple:
            return (tuple, *[walk(item) for item in x])
        if kind is slice:
            return (slice, x.start, x.stop)
        if kind is count:
            return (count, x.__reduce__()[1][0])
        if kind is MethodType:
            return (MethodType, walk(x.__self__), x.__func__)
        if kind is partial:
            return (partial, walk(x.func), walk(x.args))
        if id(x) in seen:
            return (_Again, seen[id(x)])
        seen[id(x)] = len(seen)
        return _freeze_contents(x, kind, walk)

    return walk(root)  # type: ignore[no-any-return]


def _is_hashable(x: object) -> bool:
    """A frozen dataclass may hold a list."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _freeze_contents(x: Any, kind: Any, walk: Callable[[Any], Any]) -> Frozen:
    if kind in _TELEMETRY:
        return (kind,)
    if kind is bytearray:
        return (bytearray, bytes(x))
    if kind is memoryview:
        assert type(x.obj) is bytearray, "a view of memory that is not the model's"
        return (memoryview, walk(x.obj), _address(x) - _address(x.obj), x.nbytes)
    if issubclass(kind, dict):
        return (kind, *[(walk(key), walk(value)) for key, value in x.items()])
    if kind is set:
        return (set, *sorted((walk(item) for item in x), key=repr))
    if kind in (list, deque):
        return (kind, *[walk(item) for item in x])
    names = _fields(kind) or tuple(x.__dict__)
    return (kind, *[(name, walk(getattr(x, name))) for name in names])


def _address(buffer: bytearray | memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def thaw(frozen: Frozen) -> Any:
    """Fresh objects that are as those were that `freeze` saw."""
    seen: list[Any] = []

    def walk(f: Any) -> Any:
        if type(f) is not tuple:
            return f
        kind = f[0]
        if kind is tuple:
            return tuple([walk(item) for item in f[1:]])
        if kind is slice:
            return slice(f[1], f[2])
        if kind is count:
            return count(f[1])
        if kind is MethodType:
            return MethodType(f[2], walk(f[1]))
        if kind is partial:
            return partial(walk(f[1]), *walk(f[2]))
        if kind is _Again:
            return seen[f[1]]
        return _thaw_contents(f, kind, walk, seen)

    return walk(frozen)


def _thaw_contents(f: Any, kind: Any, walk: Callable[[Any], Any], seen: list[Any]) -> Any:
    """An object is known before its contents are: they may refer to it."""
    if kind is memoryview:
        at = len(seen)
        seen.append(None)
        seen[at] = memoryview(walk(f[1]))[f[2] : f[2] + f[3]]
        return seen[at]
    x = kind() if kind in _MADE_EMPTY else kind.__new__(kind)
    seen.append(x)
    if kind is bytearray:
        x[:] = f[1]
    elif issubclass(kind, dict):
        for key, value in f[1:]:
            dict.__setitem__(x, walk(key), walk(value)) if kind is not OrderedDict else (
                x.__setitem__(walk(key), walk(value))
            )
    elif kind is set:
        x.update(walk(item) for item in f[1:])
    elif kind in (list, deque):
        x.extend(walk(item) for item in f[1:])
    else:
        for name, value in f[1:]:
            object.__setattr__(x, name, walk(value))
    return x
