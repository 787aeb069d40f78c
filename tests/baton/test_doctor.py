"""`baton doctor` on this machine and on model folders, whole and damaged."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from baton import doctor
from baton.bundled_model import DEFAULT_MODEL
from baton.model_report import choose_dtype, kv_bytes_per_token, report_on
from engine.numerics import DTYPES, has_bf16_units, resolve_dtype
from kernels.cpu_ops import load_cpu_ops
from node import machine
from wire.errors import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros((10, 10), np.float16)}, tmp_path / "model.safetensors")
    return tmp_path


def run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(flags))


def test_table(capsys: Any) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    for text in ("usable cores", "instruction sets", "transformers", "zmq", "threads per node"):
        assert text in out
    assert "no problems found" in out


def test_json(capsys: Any) -> None:
    assert run("--json") == 0
    findings = json.loads(capsys.readouterr().out)
    sections = {"machine", "software", "transports", "cpu_kernels", "choices", "problems"}
    assert set(findings) == sections
    assert findings["software"]["torch"] == torch.__version__
    assert findings["machine"]["usable_cores"] >= 1


def test_starts_without_torch() -> None:
    code = (
        "import sys, argparse; from baton import doctor; doctor.machine.ACCELERATOR_DEVICES = ();"
        "doctor.run(argparse.Namespace(model=None, json=True, load=False, device='cpu'));"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_model(folder: Path, capsys: Any) -> None:
    assert run(str(folder), "--json") == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["max_model_len"] == 256
    assert model["stored_dtype"] == "bfloat16"


def test_kv_bytes_follow_the_dtype(folder: Path) -> None:
    fast, slow = (report_on(folder, has_bf16_units=units) for units in (True, False))
    assert (fast["dtype"], fast["kv_bytes_per_token"]) == ("bfloat16", 3 * 2 * 2 * 8 * 2)
    assert (slow["dtype"], slow["kv_bytes_per_token"]) == ("float32", 3 * 2 * 2 * 8 * 4)
    assert slow["weight_bytes_in_memory"] == 2 * fast["weight_bytes_in_memory"]


def test_truncated_model_is_a_problem_that_names_the_file(folder: Path, capsys: Any) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(str(folder)) == 1
    assert "model.safetensors is truncated" in capsys.readouterr().out


def test_missing_folder_and_missing_tokenizer_are_problems(folder: Path, capsys: Any) -> None:
    assert run(str(folder / "absent")) == 1
    assert "no model folder" in capsys.readouterr().out
    (folder / "tokenizer.json").unlink()
    assert run(str(folder)) == 1
    assert "no tokenizer.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        ({"n_layer": 2, "n_head": 4, "n_embd": 16}, 2 * 2 * 4 * 4 * 4),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "head_dim": 8}, 512),
        ({"num_hidden_layers": 2}, None),
    ],
)
def test_kv_bytes_of_other_configs(config: dict[str, int], per_token: int | None) -> None:
    assert kv_bytes_per_token(config, "float32") == per_token


def test_the_engine_agrees_on_dtype_and_bf16_units() -> None:
    assert machine.look().has_bf16_units == has_bf16_units()
    for name, dtype in DTYPES.items():
        for units in (True, False):
            theirs = resolve_dtype("auto", dtype, device="cpu", has_bf16_units=units)
            assert str(theirs) == f"torch.{choose_dtype(name, has_bf16_units=units)}"


def test_transports_come_from_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.transport_state("zmq") == "ready"
    monkeypatch.setitem(doctor.TRANSPORTS, "pigeon", ())
    assert doctor.transport_state("pigeon") == "not built in yet"
    monkeypatch.setitem(doctor.TRANSPORTS, "zmq", ("no-such-package",))
    assert doctor.transport_state("zmq") == "needs the package no-such-package"


@pytest.mark.parametrize("part", ["cuda", "ib"])
def test_what_ucx_there_is_comes_from_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "libucx" / "lib" / "ucx"
    folder.mkdir(parents=True)
    (tmp_path / "libucx" / "__init__.py").touch()
    (folder / f"libuct_{part}.so.0").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "libucx", raising=False)
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.2.3")
    said = doctor.transport_state("ucx")
    assert said.startswith("ready: UCX 1.2.3, ")
    assert ("CUDA built in, RDMA not" in said) is (part == "cuda")
    assert ("CUDA not, RDMA built in" in said) is (part == "ib")
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    assert doctor.transport_state("ucx") == "needs the package ucxx-cu12"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (3 << 40, "3072 GiB")],
)
def test_size(num_bytes: int, text: str) -> None:
    assert machine.size(num_bytes) == text


# ---------------------------------------------------------------- compiled kernels, fusions


def test_kernels_that_were_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install a C++ compiler" in doctor.kernels_state(frozenset(), tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "c++ is here" in doctor.kernels_state(frozenset(), tmp_path)


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ({"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma"}, "avx512"),
        ({"avx512f", "avx2", "fma"}, "avx2"),
        ({"asimd"}, "plain"),
    ],
)
def test_kernels_that_were_built(tmp_path: Path, flags: set[str], isa: str) -> None:
    source, built = tmp_path / "cpu_ops.inc", tmp_path / f"_cpu_ops{EXTENSION_SUFFIXES[0]}"
    for path, when in ((source, 100), (built, 200)):
        path.touch()
        os.utime(path, (when, when))
    assert doctor.kernels_state(frozenset(flags), tmp_path) == f"built, {isa}"
    os.utime(source, (300, 300))
    assert "older than their source" in doctor.kernels_state(frozenset(flags), tmp_path)


def test_the_instruction_set_is_the_kernels_own() -> None:
    ops = load_cpu_ops()
    if ops is None:
        pytest.skip("the CPU kernels were not built")
    state = doctor.kernels_state(machine.look().cpu_flags)
    assert state == f"built, {ops.isa}" or "older" in state


def test_a_loaded_model_tells_what_was_fused(capsys: Any) -> None:
    assert run(str(DEFAULT_MODEL), "--load", "--json") == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert "packed linears" in found["fusions"]
    assert {"operations", "deterministic", "numerics"} <= set(found)


def test_load_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="--load needs a MODEL"):
        run("--load")
