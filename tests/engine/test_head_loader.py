"""What a head's files may be, and the one line for each that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.drafting.head import DraftHead
from engine.drafting.head_loader import load_head
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from tests.engine.head_engines import make_drafter, make_engine, num_drafted, run_all
from tests.engine.tiny_heads import GLM, add_mtp, save_eagle, save_eagle3, save_llama
from tests.engine.tiny_models import ARCHITECTURES, save_random_model
from wire.errors import ConfigError
from wire.types import SamplingParams

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_llama(tmp_path_factory.mktemp("llama")))


def refused(method: str, folder: Path, target: LoadedModel) -> str:
    with pytest.raises(ConfigError) as caught:
        load_head(method, folder, target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(folder: Path, change: Callable[[Tensors], object] = len, **config: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def drafts_with(target: LoadedModel, head: LoadedModel) -> int:
    """Draft tokens of a request; it ends as it has to."""
    engine = make_engine(target, make_drafter(head.architecture, head))
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=2, ignore_eos=True)
    engine.add(Request("r", [3, 4, 5, 6, 7], 5, sampling, 60))
    drafted, _ = num_drafted(run_all(engine))
    return drafted


def test_forms_of_eagle(llama: LoadedModel, tmp_path: Path) -> None:
    """Without a bias, of two layers, with biases of attention, and with vLLM's wrapped config."""
    two = load_head("eagle", save_eagle(tmp_path / "two", num_layers=2, bias=False), llama)
    assert two.num_layers == 2
    biased = changed(
        save_eagle(tmp_path / "biased"),
        lambda t: t.update({"layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        model_type="qwen2",
    )
    config = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps({"model_type": "eagle", "model": config}))
    for head in (two, load_head("eagle", biased, llama)):
        assert drafts_with(llama, head) > 0


def test_forms_of_eagle3(llama: LoadedModel, tmp_path: Path) -> None:
    """Of another width, with its own embedding, layer 0 for midlayer, and settings elsewhere."""
    folder = save_eagle3(tmp_path / "head", [1], eagle_config=None, norm_before_residual=True)

    def other_names(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        tensors["embed_tokens.weight"] = torch.randn(97, 32)

    changed(folder, other_names, eagle_aux_hidden_state_layer_ids=[1])
    head = load_head("eagle3", folder, llama)
    assert head.model.layers == (1,)
    assert isinstance(head.model.embed, torch.nn.Embedding)
    assert head.model.body.layers[0]._keeps_normed
    assert drafts_with(llama, head) > 0


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_head_on_other_models(tmp_path: Path, name: str) -> None:
    """Fused or as transformers wrote them: their layers and states are found."""
    target = load_model(save_random_model(*ARCHITECTURES[name], tmp_path / "target"))
    for head in (
        load_head("eagle", save_eagle(tmp_path / "eagle"), target),
        load_head("eagle3", save_eagle3(tmp_path / "eagle3", [0, 1]), target),
    ):
        assert drafts_with(target, head) > 0


def test_mtp_of_a_mixture_of_experts_is_what_transformers_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM's own layer, experts and all, by transformers' own way to load and run it."""
    from transformers import Glm4MoeForCausalLM
    from transformers.modeling_layers import MtpModel

    folder = add_mtp(save_random_model(*GLM, tmp_path / "glm"))
    target = load_model(folder)
    head = load_head("mtp", folder, target)
    assert isinstance(head.model, DraftHead)
    drafter = make_drafter("mtp", head)
    engine = make_engine(target, drafter)
    tokens = list(range(3, 20))
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add(Request("r", tokens, len(tokens), sampling, 60))
    run_all(engine)

    pattern = [r"model\.layers\.2\."]
    monkeypatch.setattr(Glm4MoeForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern)
    theirs = Glm4MoeForCausalLM.from_pretrained(folder).eval()
    mtp: Any = MtpModel.from_pretrained(theirs).eval()
    assert len(drafter.seen) >= 8
    for known, _, draft in drafter.seen:
        ids = torch.tensor([known])
        with torch.inference_mode():
            states = theirs(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
            positions = torch.arange(1, len(known))[None]
            state = mtp.forward_layer(0, states, positions, None, input_ids=ids[:, 1:])
            assert draft[0] == int(mtp._project_to_logits(state)[0, -1].argmax())


def test_what_is_missing_or_left_over(llama: LoadedModel, tmp_path: Path) -> None:
    folder = changed(save_eagle(tmp_path / "a"), lambda t: t.pop("fc.weight"))
    assert "the head's tensor fc.weight is missing" in refused("eagle", folder, llama)
    folder = changed(save_eagle(tmp_path / "b"), lambda t: t.pop("layers.0.mlp.up_proj.weight"))
    assert "layers.0.mlp.up_proj.weight is missing" in refused("eagle", folder, llama)
    folder = changed(save_eagle3(tmp_path / "c", [0, 1]), lambda t: t.pop("d2t"))
    assert "d2t is missing" in refused("eagle3", folder, llama)
    folder = changed(save_eagle(tmp_path / "d"), lambda t: t.update(gate=torch.ones(2)))
    assert "of no known form, first gate" in refused("eagle", folder, llama)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "convert them to safetensors" in refused("eagle", folder, llama)


def test_of_another_model(llama: LoadedModel, tmp_path: Path) -> None:
    folder = changed(save_eagle(tmp_path / "a"), hidden_size=64)
    assert "states of 64 numbers, the model's have 32" in refused("eagle", folder, llama)
    folder = changed(save_eagle(tmp_path / "b"), vocab_size=96)
    assert "is for 96 tokens, the model has 97" in refused("eagle", folder, llama)
    folder = save_eagle3(tmp_path / "c", [0, 2])
    assert "reads the layers [0, 2], the model has 2" in refused("eagle3", folder, llama)
    folder = save_eagle3(tmp_path / "d", [], eagle_config={})
    assert "eagle_aux_hidden_state_layer_ids" in refused("eagle3", folder, llama)
    folder = changed(
        save_eagle3(tmp_path / "e", [0, 1]), lambda t: t.update(d2t=torch.full((48,), 60))
    )
    assert "d2t names tokens" in refused("eagle3", folder, llama)
    folder = changed(
        save_eagle3(tmp_path / "f", [0, 1]), lambda t: t.update({"fc.weight": torch.ones(32, 96)})
    )
    assert "fc.weight has shape [32, 96], not [32, 64]" in refused("eagle3", folder, llama)


def test_a_model_that_does_not_show_its_states(llama: LoadedModel, tmp_path: Path) -> None:
    silent = replace(llama, can_embed=False)
    assert "does not show the states" in refused("eagle", save_eagle(tmp_path / "a"), silent)


def test_layers_of_an_unknown_kind(llama: LoadedModel, tmp_path: Path) -> None:
    folder = changed(save_eagle(tmp_path / "a"), model_type="deepseek_v2")
    assert "layers of deepseek_v2 is not supported" in refused("eagle", folder, llama)
    folder = changed(save_eagle3(tmp_path / "b", [0, 1]), num_hidden_layers=2)
    assert "an EAGLE-3 head of 2 layers" in refused("eagle3", folder, llama)


def test_a_model_without_layers_that_predict(llama: LoadedModel, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "plain")
    assert "no layers that predict next tokens" in refused("mtp", folder, load_model(folder))
    folder = changed(add_mtp(folder), lambda t: t.pop("model.layers.2.eh_proj.weight"))
    assert "eh_proj.weight is missing" in refused("mtp", folder, load_model(folder))


def test_numbers_that_are_none(llama: LoadedModel, tmp_path: Path) -> None:
    folder = changed(save_eagle(tmp_path / "a"), lambda t: t["fc.weight"].fill_(torch.nan))
    assert "holds NaN" in refused("eagle", folder, llama)
