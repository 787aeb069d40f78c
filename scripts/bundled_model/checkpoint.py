"""Checkpoints without pickle: weights and optimizer state as safetensors, counters as JSON."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class Progress:
    """How far a run is; kept across interruptions."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # time spent computing, over all sittings


def save(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write the checkpoint folder; each file is replaced in one piece."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    _replace(path / "weights.safetensors", weights)
    _replace(path / "optimizer.safetensors", _flatten(optimizers))
    (path / "progress.json").write_text(json.dumps(asdict(progress)))


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restore all that `save` wrote."""
    load_weights(path, model)
    flat = load_file(path / "optimizer.safetensors")
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            owner, index, name = key.split(".")
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return load_progress(path)


def load_progress(path: Path) -> Progress:
    """How far the run was that wrote the checkpoint."""
    fields: dict[str, Any] = json.loads((path / "progress.json").read_text())
    return Progress(**fields)


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore the weights only."""
    weights = load_file(path / "weights.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])


def _flatten(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{index}.{name}": tensor.contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def _replace(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)
