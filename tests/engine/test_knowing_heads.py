"""Heads that know their target are always right: every state stands at the row that it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.drafting.control import Controller
from engine.drafting.head_loader import load_head
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import StepPlan
from engine.request import Request
from tests.engine.head_engines import Watched, make_drafter, make_engine, num_drafted, run_all
from tests.engine.tiny_heads import add_mtp, save_eagle, save_eagle3, save_llama
from wire.types import SamplingParams

TURN = torch.eye(32).roll(7, 0)
"""As a vocabulary: behind token i comes i + 7 (modulo 32), if states are one-hot."""
NONE = torch.zeros(32, 32)
SCALE = 32**0.5 / 4  # of a one-hot state after a norm, over that of an embedding


def make_plain(folder: Path, **parts: Tensor) -> Path:
    """Layers that change nothing, norms without weights, and these parts, by a part of a name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = torch.zeros_like(tensor)
        elif "norm" in name:
            tensors[name] = torch.ones_like(tensor)
        for part, value in parts.items():
            if part in name and tensor.dim() == 2:
                tensors[name] = value.clone()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    folder = tmp_path_factory.mktemp("turning") / "target"
    save_llama(folder, vocab_size=32)
    add_mtp(folder)
    make_plain(folder, embed_tokens=4 * torch.eye(32), lm_head=TURN)
    return folder, load_model(folder)


def knowing_head(method: str, by_state: bool, folder: Path, target: Path) -> Path:
    """A head that takes the next token from the state, or from the token beside it."""
    entry = torch.cat((NONE, TURN) if by_state else (SCALE * torch.eye(32), NONE), -1)
    if method == "eagle":
        save_eagle(folder, bias=False)
        return make_plain(with_vocabulary(folder), fc=entry)
    if method == "eagle3":
        save_eagle3(folder, [0, 1])
        return make_plain(with_vocabulary(folder), fc=torch.cat((TURN, NONE), -1), lm_head=TURN)
    shutil.copytree(target, folder)
    return make_plain(folder, eh_proj=entry)


def with_vocabulary(folder: Path) -> Path:
    """Of 32 tokens, all of them."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 32, "draft_vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if "d2t" in tensors:
        tensors |= {"d2t": torch.zeros(32, dtype=torch.int64), "lm_head.weight": NONE}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Shifted(Watched):
    """Is shown every state one row late."""

    late: Tensor

    def saw(self, plan: StepPlan, states: Tensor) -> None:
        before = getattr(self, "late", states[:1])
        self.late = states[-1:]
        super().saw(plan, torch.cat((before, states[:-1])))


@pytest.mark.parametrize(
    ("method", "by_state", "temperature"),
    [
        ("eagle", True, 0.0),
        ("eagle3", True, 0.0),
        ("mtp", True, 0.0),
        ("eagle", False, 0.0),
        ("eagle", False, 1.0),
        ("mtp", False, 1.0),
    ],
)
def test_a_head_that_knows_the_target_is_always_right(
    turning: tuple[Path, LoadedModel],
    tmp_path: Path,
    method: str,
    *,
    by_state: bool,
    temperature: float,
) -> None:
    """Every state is of the row that the formulas say, and every token is drawn with its noise."""
    folder, target = turning
    most = 1 if method == "eagle3" else 4  # its layer, which does nothing here, would have to turn
    head = load_head(method, knowing_head(method, by_state, tmp_path / "head", folder), target)
    for kind, right in ((Watched, True), (Shifted, not by_state)):
        drafter = make_drafter(method, head, kind=kind)
        engine = make_engine(target, drafter, Controller(most, adaptive=False))
        tokens = [(3 + 7 * i) % 32 for i in range(6)]
        sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=1, ignore_eos=True)
        engine.add(Request("r", tokens, 6, sampling, 60))
        drafted, accepted = num_drafted(run_all(engine))
        assert drafted >= 19
        assert accepted == drafted if right else accepted < drafted / 4
