"""The text that the bundled model learns from: the Python standard library of this interpreter.

Four streams come out of it. `library` is the sources without their tests, one file after the
other. `tests` is the standard library's own test suite where it is installed: plain Python too,
but repetitive, so it only serves to stretch a small corpus. `chat` turns functions, classes,
modules and help topics into questions and answers. `everyday` holds hand-written answers to what
people type first (everyday.md). A file is held out by the hash of its path, so the split is the
same everywhere; nothing of a held-out file enters any training stream.
"""

import ast
import hashlib
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "encodings",
    "pydoc_data",
}
TESTS = {"test", "tests", "idle_test"}
MAX_TEST_BYTES = 150_000  # larger ones are mostly tables
HELD_OUT_SHARE = 0.03
EVERYDAY = Path(__file__).with_name("everyday.md")
EVERYDAY_REPEATS = 8  # in other orders, so that no answer announces a question
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a Python programmer.")

Message = dict[str, str]
Chat = list[Message]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file of the standard library; `name` is its path below the library's root."""

    name: str
    text: str

    @property
    def is_test(self) -> bool:
        return bool(TESTS & set(Path(self.name).parts))

    @property
    def is_held_out(self) -> bool:
        return not self.is_test and _fraction(self.name) < HELD_OUT_SHARE

    @cached_property
    def tree(self) -> ast.Module | None:
        try:
            return ast.parse(self.text)
        except SyntaxError:  # the test suite contains broken files on purpose
            return None


@dataclass
class Corpus:
    """The documents by stream; `held_out` belongs to none of them."""

    library: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    everyday: list[Chat | str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every source file below `root` (default: this interpreter's library)."""
    corpus = Corpus()
    for source in read_sources(root or Path(sysconfig.get_path("stdlib"))):
        if source.is_held_out:
            corpus.held_out.append(source.text)
        elif source.is_test:
            corpus.tests.append(source.text)
        else:
            corpus.library.append(source.text)
            corpus.chats.extend(chats_of(source))
    corpus.chats.extend(topic_chats())
    corpus.everyday = [*everyday_chats(), *everyday_code()] * EVERYDAY_REPEATS
    rng = random.Random(0)
    for stream in (corpus.library, corpus.tests, corpus.chats, corpus.everyday):
        rng.shuffle(stream)
    return corpus


def read_sources(root: Path) -> Iterator[Source]:
    """All files that are UTF-8, parse, and are not generated tables."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts) or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        data = path.read_bytes()
        try:
            source = Source(name.as_posix(), data.decode())
        except UnicodeDecodeError:
            continue
        too_large = source.is_test and len(data) > MAX_TEST_BYTES
        if data and not too_large and source.tree is not None:
            yield source


# -- questions and answers -----------------------------------------------------------------------


def chats_of(source: Source) -> list[Chat]:
    """Every documented function, class and the module itself, each asked about in one way."""
    if source.tree is None:
        return []
    chats = list(_module_chats(source))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            chats.extend(_function_chats(source, node))
        elif isinstance(node, ast.ClassDef):
            chats.extend(_class_chats(source, node))
    return chats


def _module_chats(source: Source) -> Iterator[Chat]:
    summary = _summary(source.tree, paragraphs=2)
    module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if summary and not module.startswith("_"):
        rng = random.Random(module)
        question = rng.choice(
            ["What is the module `{}` for?", "What does the `{}` module do?", "Explain `{}`."]
        )
        yield _chat(question.format(module), summary, rng)


def _function_chats(source: Source, node: Function) -> Iterator[Chat]:
    code = _code(source, node)
    summary = _summary(node)
    if not summary or not 3 <= code.count("\n") <= 60:
        return
    rng = random.Random(f"{source.name}:{node.name}:{node.lineno}")
    what = summary.split("\n")[0].rstrip(".")
    what = what[:1].lower() + what[1:]
    kind = rng.random()
    if kind < 0.2:
        yield _chat(f"Explain this function:\n{fenced(code)}", summary, rng)
    elif kind < 0.35:
        signature = code[: code.index(":\n") + 1] if ":\n" in code else code
        yield _chat(f"Complete this function:\n{fenced(signature)}", fenced(code), rng)
    elif kind < 0.75:
        question = rng.choice(
            [
                "Write a function `{0}`: {1}.",
                "Write a Python function `{0}`. It should {1}.",
                "Write a function {0}",
                "Show me a function named {0}.",
            ]
        )
        yield _chat(question.format(node.name, what), fenced(code), rng)
    else:
        question = rng.choice(["Write a function to {}.", "How do I {} in Python?"])
        yield _chat(question.format(what), fenced(code), rng)


def _class_chats(source: Source, node: ast.ClassDef) -> Iterator[Chat]:
    code = _code(source, node)
    summary = _summary(node)
    if summary and 4 <= code.count("\n") <= 60:
        rng = random.Random(f"{source.name}:{node.name}")
        question = rng.choice(["Write a class `{0}`: {1}", "Write a Python class {0}."])
        yield _chat(question.format(node.name, summary.split("\n")[0]), fenced(code), rng)


def topic_chats() -> list[Chat]:
    """Python's own help texts, `help("assert")` and so on."""
    from pydoc_data.topics import topics

    chats = []
    for topic, text in sorted(topics.items()):
        rng = random.Random(topic)
        question = rng.choice(
            ["Explain `{}` in Python.", "What is `{}` in Python?", "Tell me about {} in Python."]
        )
        chats.append(_chat(question.format(topic), _leading_paragraphs(text, 1_500), rng))
    return chats


def everyday_chats() -> list[Chat]:
    """The hand-written answers, each to all its questions."""
    rng = random.Random(0)
    sections = EVERYDAY.read_text(encoding="utf-8").split("\n## ")[1:]
    parts = (section.split("\n", 1) for section in sections)
    return [
        _chat(question, answer.strip(), rng)
        for heading, answer in parts
        for question in heading.split(" | ")
    ]


def everyday_code() -> list[str]:
    """The code of the answers alone: a function may also be completed outside of a chat."""
    text = EVERYDAY.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def fenced(code: str) -> str:
    """Code as a Markdown block, as chat windows expect it."""
    return f"```python\n{code}\n```"


def _chat(question: str, answer: str, rng: random.Random) -> Chat:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if rng.random() < 0.2:
        turns.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return turns


def _code(source: Source, node: Function | ast.ClassDef) -> str:
    lines = source.text.splitlines()[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines))


def _summary(node: ast.Module | Function | ast.ClassDef | None, paragraphs: int = 1) -> str:
    docstring = (ast.get_docstring(node) if node else None) or ""
    summary = "\n\n".join(docstring.split("\n\n")[:paragraphs])
    usable = 8 <= len(summary) <= 800 and not summary.startswith(">>>")
    return summary if usable else ""


def _leading_paragraphs(text: str, limit: int) -> str:
    kept = ""
    for paragraph in text.strip().split("\n\n"):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept += paragraph + "\n\n"
    return kept.strip()


def _fraction(name: str) -> float:
    """A number in [0, 1) that only depends on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
