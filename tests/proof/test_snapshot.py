"""Frozen and thawed, objects are as they were, whoever shares them."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from functools import partial
from itertools import count
from typing import Any

from tests.proof.snapshot import freeze, thaw


class Thing:
    """Refers to itself, to others, and to a method of its own."""

    def __init__(self) -> None:
        self.me = self
        self.memory = [bytearray(b"abc"), bytearray(b"abc")]
        self.view = memoryview(self.memory[1])
        self.part = self.view[1:2]
        self.ordered = OrderedDict([("b", {3, 1, 2}), ("a", deque([1]))])
        self.counted = Counter("aab")
        self.numbers = count(5)
        self.add = partial(self.append, 7)
        self.extra: list[int] = []

    def append(self, item: int) -> None:
        self.extra.append(item)


def test_a_copy_is_equal_and_independent() -> None:
    thing = Thing()
    next(thing.numbers)
    frozen = freeze(thing)
    copy: Any = thaw(frozen)
    assert freeze(copy) == frozen
    copy.add()
    copy.view[0] = ord("x")
    assert bytes(copy.part) == b"b"
    copy.part[0] = ord("y")
    assert copy.me is copy
    assert (copy.extra, thing.extra) == ([7], [])
    assert (bytes(copy.memory[0]), bytes(copy.memory[1])) == (b"abc", b"xyc")
    assert bytes(thing.memory[1]) == b"abc"
    assert list(copy.ordered) == ["b", "a"]
    assert next(copy.numbers) == 6
    assert freeze(copy) != frozen


def test_sharing_is_part_of_the_value() -> None:
    one: list[int] = []
    assert freeze([one, one]) != freeze([[], []])
    first, second = thaw(freeze([one, one]))
    assert first is second


def test_the_order_of_a_set_is_no_part_of_it() -> None:
    assert freeze({1, 9, 17}) == freeze({17, 9, 1})
