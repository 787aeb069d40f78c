"""The loader: what it learns; damaged or unsupported models are refused in one clear line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.loader import load_model
from engine.numerics import numerics_fingerprint, resolve_dtype
from tests.engine.tiny_models import REFUSED, save_random_model
from wire.errors import ConfigError, UnsupportedModelError
from wire.layout import KVLayout

WEIGHTS = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(make_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that the test may damage."""
    return Path(shutil.copytree(make_model("llama"), tmp_path / "broken"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_learnt(make_model: Callable[[str], Path]) -> None:
    folder = make_model("llama")
    loaded = load_model(folder, dtype="float32")
    assert loaded.kv_layout(16) == KVLayout(2, 2, 8, 16, "float32")
    assert (loaded.vocab_size, loaded.max_model_len) == (97, 128)
    assert loaded.eos_token_ids == (2,)
    assert loaded.name == folder.name
    assert loaded.architecture == "LlamaForCausalLM"
    stored = load_file(folder / WEIGHTS)
    assert loaded.num_weight_bytes == 4 * sum(tensor.numel() for tensor in stored.values())
    kernels = f"{loaded.ops.name}+fused{'' if loaded.not_deterministic else '+deterministic'}"
    assert loaded.numerics == numerics_fingerprint(
        dtype=torch.float32, device="cpu", kernels=kernels
    )
    assert loaded.unexpected_tensors == ()
    assert not loaded.model.training


def test_end_tokens_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_model(folder).eos_token_ids == (5, 7)
    (folder / "generation_config.json").unlink()
    assert load_model(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(folder)


def test_progress_goes_through_every_stage_to_its_end(make_model: Callable[[str], Path]) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    load_model(make_model("llama"), progress=lambda s, d, t: seen.setdefault(s, []).append((d, t)))
    assert list(seen) == ["reading weights", "loading weights", "checking weights"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_transformers_says_nothing_and_keeps_its_settings(
    make_model: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as bars

    bars.enable_progress_bar()
    level = logging.getLogger("transformers").level
    load_model(make_model("llama"))
    assert bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    assert logging.getLogger("transformers").level == level
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_follows_content_alone(folder: Path, tmp_path: Path) -> None:
    digest = load_model(folder).fingerprint
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    assert load_model(moved).fingerprint == digest
    raw = bytearray((moved / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (moved / WEIGHTS).write_bytes(raw)
    assert load_model(moved).fingerprint != digest
    raw[-1] ^= 1
    (moved / WEIGHTS).write_bytes(raw)
    edit_config(moved, rms_norm_eps=1e-5)
    assert load_model(moved).fingerprint != digest


def test_a_missing_tensor_is_never_made_up(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(TENSOR))
    message = refusal(folder)
    assert TENSOR in message
    assert "missing" in message


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    message = refusal(folder)
    assert "[48, 32]" in message or "[32, 48]" in message
    assert "do not belong together" in message


def test_an_unexpected_tensor_is_reported(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(stray=torch.zeros(3)))
    assert load_model(folder).unexpected_tensors == ("stray",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[TENSOR][3].fill_(value))
    assert TENSOR in refusal(folder)


def test_large_but_finite_weights_are_not_refused_as_infinite(folder: Path) -> None:
    """The sum of a chunk overflows before any of its elements does."""
    edit_tensors(folder, lambda tensors: tensors[TENSOR].fill_(3e38))
    with pytest.raises(UnsupportedModelError):  # the probe meets the overflow; not the weight check
        load_model(folder, dtype="float32")


def test_a_truncated_file_is_named_with_its_tensor(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    message = refusal(folder)
    assert f"{folder / WEIGHTS} is truncated: tensor model." in message


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "truncated or no safetensors file"),
        (b"\x00" * 4, "truncated or no safetensors file"),
        (b"\xff" * 64, "truncated or no safetensors file"),
        ((4).to_bytes(8, "little") + b"{nope", "not JSON"),
        ((4).to_bytes(8, "little") + b"[10]", "not a JSON object"),
    ],
)
def test_a_file_that_is_no_safetensors_file(folder: Path, raw: bytes, says: str) -> None:
    (folder / WEIGHTS).write_bytes(raw)
    message = refusal(folder)
    assert says in message
    assert WEIGHTS in message


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "starts at byte 4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "damaged"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "damaged"),
        ({"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}, "damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "4 bytes after the last tensor"),
    ],
)
def test_offsets_that_contradict_the_data(folder: Path, entry: dict[str, Any], says: str) -> None:
    header = json.dumps({"some.weight": entry}).encode()
    raw = len(header).to_bytes(8, "little") + header + b"\x00" * 8
    (folder / WEIGHTS).write_bytes(raw)
    message = refusal(folder)
    assert says in message
    assert WEIGHTS in message


def shard(folder: Path) -> Path:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = folder / "model.safetensors.index.json"
    weight_map = {n: file for file, part in parts.items() for n in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(folder: Path) -> None:
    whole = load_model(folder).model.state_dict()
    shard(folder)
    parts = load_model(folder).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()
    assert "1 of 2 weight files missing, first b.safetensors" in refusal(folder)


def test_a_tensor_that_is_not_in_its_shard(folder: Path) -> None:
    index = shard(folder)
    content = json.loads(index.read_text())
    content["weight_map"][TENSOR + "2"] = "a.safetensors"
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert TENSOR + "2" in message
    assert "a.safetensors" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"x": "../x.safetensors"}}'])
def test_an_index_that_makes_no_sense(folder: Path, content: str) -> None:
    shard(folder).write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pickle" in message
    assert "safetensors" in message


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "has no weights" in refusal(folder)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_size": "wide"}, "config"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "mine"}, "config"),
    ],
)
def test_configs_that_cannot_be_used(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(folder, **changes)
    message = refusal(folder)
    assert says in message
    assert message.startswith("LlamaForCausalLM")


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)


def test_arguments_that_cannot_be_met(folder: Path) -> None:
    assert "int3" in refusal(folder, dtype="int3")
    assert "128 positions" in refusal(folder, max_model_len=129)
    assert "too short" in refusal(folder, max_model_len=7)
    assert "cuda:99" in refusal(folder, device="cuda:99")
    assert "warp" in refusal(folder, device="warp")
    assert load_model(folder, max_model_len=100).max_model_len == 100


@pytest.mark.parametrize(
    ("requested", "stored", "device", "units", "chosen"),
    [
        ("auto", torch.float32, "cpu", True, torch.float32),
        ("auto", torch.bfloat16, "cpu", True, torch.bfloat16),
        ("auto", torch.bfloat16, "cpu", False, torch.float32),
        ("auto", torch.float16, "cpu", True, torch.float32),
        ("auto", torch.float16, "cuda", False, torch.float16),
        ("auto", torch.float64, "cuda", False, torch.float16),
        ("bfloat16", torch.float32, "cpu", False, torch.bfloat16),
    ],
)
def test_dtype(
    requested: str, stored: torch.dtype, device: str, units: bool, chosen: torch.dtype
) -> None:
    assert resolve_dtype(requested, stored, device=device, has_bf16_units=units) == chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_in_another_dtype(folder: Path, dtype: str) -> None:
    loaded = load_model(folder, dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.kv_layout(4).dtype == dtype


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_and_reason(name: str, tmp_path: Path) -> None:
    config_class, changes, reason = REFUSED[name]
    save_random_model(config_class, changes, tmp_path)
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path, dtype="float32")
    message = str(caught.value)
    assert message.startswith(architecture)
    assert reason in message
    assert "\n" not in message


def test_a_model_without_a_maximal_length(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.loader.resolve_max_model_len", lambda config, requested: None)
    assert "--max-model-len" in refusal(make_model("llama"))
