"""Prompts: code to complete, text that repeats itself, and noise."""

from __future__ import annotations

import random

CODE = [
    '''def read_lines(path):
    """Read a file and return its lines."""
    with open(path) as f:
        return [line.strip() for line in f]


def count_words(path):
    """Count the words of a file."""
''',
    '''class Stack:
    """A last-in first-out list."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
''',
    '''import json


def load_config(path):
    """Load a JSON file."""
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def save_config(path, config):
''',
    """def test_add():
    assert add(1, 2) == 3


def test_subtract():
    assert subtract(3, 2) == 1


def test_multiply():
""",
]

REPEATING = "".join(
    f'    ("{name}", {number}, "the {name} of the list", None),\n'
    for _ in range(6)
    for number, name in enumerate(("first", "second", "third", "fourth"))
)


def noise(seed: int, length: int, vocab_size: int) -> list[int]:
    """Tokens that have nothing to do with one another."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]
