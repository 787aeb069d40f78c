"""Who may import whom: the table of `CONTRIBUTING.md`, held against every import statement.

     L4  baton                                      may import all
     L3  router    prefill_node    decode_node      never each other
     L2b node
     L2  engine    kvtransfer    tuner              never each other
     L1  kernels   wire    telemetry                kernels imports nothing of the project

Imports inside functions and under TYPE_CHECKING count as well. What an import drags in at run time
is looked at in fresh processes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

L1 = {"wire", "telemetry"}
MAY_IMPORT: dict[str, set[str]] = {
    "wire": set(),
    "kernels": set(),
    "telemetry": set(),
    "engine": {"kernels", *L1},
    "kvtransfer": L1,
    "tuner": L1,
    "node": {"engine", "kvtransfer", *L1},
    "prefill_node": {"node", "engine", "kvtransfer", *L1},
    "decode_node": {"node", "engine", "kvtransfer", *L1},
    "router": {"tuner", *L1},
}
MAY_IMPORT["baton"] = set(MAY_IMPORT)

MUST_NOT_NAME: dict[str, set[str]] = {
    "wire": {"torch", "transformers"},
    "kernels": {"transformers"},
    "telemetry": {"torch", "transformers"},
    "engine": {"asyncio", "zmq", "aiohttp"},
    "tuner": {"torch", "transformers"},
    "router": {"torch", "transformers"},
}
UNREADABLE = "a name computed at run time"  # which would be a way around the table
NEVER = {"pickle", "marshal", "shelve"}
OUTSIDE = {"tests", "benchmarks", "scripts"}  # no package may need them

LOADS_NO_TORCH = [
    *("wire", "telemetry", "tuner.bench", "router", "router.__main__"),
    "baton.simulation.simulate",
]


@dataclass(frozen=True, slots=True)
class Import:
    """One module named by an import statement."""

    path: Path
    line: int
    module: str
    at_load: bool  # runs when the file is imported, not later and not only for the type checker

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def imports_of(path: Path) -> list[Import]:
    """Every import in the file, wherever it stands."""
    return list(_walk(path, ast.parse(path.read_text(), str(path)), at_load=True))


def _walk(path: Path, node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for name in _names(path, node):
        yield Import(path, getattr(node, "lineno", 0), name, at_load)
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    later |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from _walk(path, child, at_load=at_load and not later)


def _names(path: Path, node: ast.AST) -> list[str]:
    """The modules that `node` names; of `from a import b`, both `a` and `a.b`."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0, module=str(module)):
            return [module, *(f"{module}.{alias.name}" for alias in node.names)]
        case ast.ImportFrom():
            pytest.fail(f"{path}:{node.lineno}: relative import; name the package")
        case (
            ast.Call(func=ast.Name(id="__import__" | "import_module"))
            | ast.Call(func=ast.Attribute(attr="import_module"))
        ):
            return [_text(node.args[0]) or UNREADABLE]
    return []


def _text(node: ast.expr) -> str | None:
    """The value of a string literal."""
    match node:
        case ast.Constant(value=str(text)):
            return text
    return None


def package_imports(package: str) -> list[Import]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no such package: {package}"
    return [found for path in files for found in imports_of(path)]


def test_the_table_names_every_package() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_layers(package: str) -> None:
    forbidden = (set(MAY_IMPORT) | OUTSIDE) - MAY_IMPORT[package] - {package}
    forbidden |= MUST_NOT_NAME.get(package, set()) | NEVER
    if package != "baton":  # which may import all, and imports what a subcommand needs
        forbidden.add(UNREADABLE)
    wrong = {str(found) for found in package_imports(package) if found.package in forbidden}
    assert not wrong, "\n".join(sorted(wrong))


def test_the_walk_sees_hidden_imports(tmp_path: Path) -> None:
    source = """
import a.b
from c import d
if TYPE_CHECKING:
    import e
def f():
    from g import h
    importlib.import_module("i.j")
    import_module(name)
"""
    path = tmp_path / "example.py"
    path.write_text(source)
    found = {(item.module, item.at_load) for item in imports_of(path)}
    late = {("e", False), ("g", False), ("g.h", False), ("i.j", False), (UNREADABLE, False)}
    assert found == {("a.b", True), ("c", True), ("c.d", True), *late}


def test_no_import_cycles_at_load() -> None:
    """A cycle works only from one entry point, until somebody adds another."""
    graph = {
        module: {
            found.module for found in imports_of(path) if found.at_load and found.module != module
        }
        for module, path in _modules().items()
    }
    graph = {module: targets & set(graph) for module, targets in graph.items()}
    while leaves := [module for module, targets in graph.items() if not targets]:
        for leaf in leaves:
            del graph[leaf]
        graph = {module: targets - set(leaves) for module, targets in graph.items()}
    assert not graph, f"in or above a cycle: {sorted(graph)}"


def _modules() -> dict[str, Path]:
    """Dotted name → file, of every module of every package."""
    modules = {}
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter at the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", LOADS_NO_TORCH)
def test_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert python(code) == "[]"


# transformers looks for a package named `kernels` too. It leaves ours alone as long as the version
# that it finds for that name is out of its range.


def test_kernels_init_is_at_most_a_docstring() -> None:
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) and _text(node.value) for node in body)


def test_version_is_none_that_transformers_takes_for_its_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for version in (project["version"], metadata.version(project["name"])):
        assert not Version("0.18.2") <= Version(version) < Version("0.19.0")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")


def test_transformers_works_beside_our_kernels() -> None:
    code = """
import torch, transformers, kernels
from transformers.utils.import_utils import is_kernels_available
torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
logits = model(torch.tensor([[1, 2, 3]])).logits
print(kernels.__path__[0], is_kernels_available(), tuple(logits.shape))
"""
    assert python(code) == f"{ROOT / 'kernels'} False (1, 3, 32)"
