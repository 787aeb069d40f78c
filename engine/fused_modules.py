"""Faster forms of single modules: linears, gated MLPs and RMS norms, each proven where it is made.

They serve inside models whose layers are of no known form; a fused decoder is made of the same.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.fused_decoder import ACTIVATIONS, FusedMLP, Norm
from engine.fusing_proof import NUM_PROOF_ROWS, TOLERANCE, relative_difference
from engine.packed_linear import Linears
from engine.process_memory import MappedFiles
from kernels.ops import LayerOps


@dataclass(frozen=True, slots=True)
class Fusions:
    """What was done to a model; `baton doctor` shows it."""

    decoder: bool  # of Llama's form: runs on Baton's own operations
    packed_linears: int
    reason: str = ""  # why it is not a fused decoder
    gated_mlps: int = 0  # of a model that is none
    norms: int = 0
    storage: str = "float32"

    def __str__(self) -> str:
        counted = {"packed linears": self.packed_linears}
        counted |= {"gated MLPs": self.gated_mlps, "norms": self.norms}
        parts = ["fused decoder"] if self.decoder else []
        parts += [f"{count} {what}" for what, count in counted.items() if count]
        parts += [f"weights in {self.storage}"] if self.storage != "float32" else []
        return "; ".join(filter(None, (", ".join(parts) or "nothing fused", self.reason)))


class OtherForm(Exception):
    """The module is not of the form; the text says where."""


class ModuleFuser:
    """Replaces what it knows below a module, and counts it."""

    def __init__(self, ops: LayerOps, linears: Linears, files: MappedFiles) -> None:
        self._ops, self._linears, self._files = ops, linears, files
        self._done = Fusions(False, 0, storage=linears.storage)

    def fuse(self, model: nn.Module, reason: str) -> Fusions:
        """What was done, with the reason why it is not more; in 16 bits nothing is."""
        if all(parameter.dtype is torch.float32 for parameter in model.parameters()):
            self._walk(model)
        return replace(self._done, reason=reason)

    def _walk(self, parent: nn.Module) -> None:
        for name, module in list(parent.named_children()):
            faster = self._faster(module)
            if faster is None:
                self._walk(module)
                continue
            setattr(parent, name, faster)
            self._files.give_up(module.parameters())

    def _faster(self, module: nn.Module) -> nn.Module | None:
        done, ops = self._done, self._ops
        if type(module) is nn.Linear:
            if not self._linears.can_pack(module.weight):
                return None
            self._done = replace(done, packed_linears=done.packed_linears + 1)
            return self._linears.linear(module.weight.detach(), module.bias)
        try:
            if hasattr(module, "down_proj"):
                mlp = gated_mlp(module, ops, self._linears)
                packed = done.packed_linears + 2
                self._done = replace(done, gated_mlps=done.gated_mlps + 1, packed_linears=packed)
                return GatedMLP(mlp, ops)
            norm = rms_norm(module, ops)
        except OtherForm:
            return None
        self._done = replace(done, norms=done.norms + 1)
        return RMSNorm(norm, ops)


class GatedMLP(nn.Module):
    """A fused MLP with a module's call."""

    def __init__(self, mlp: FusedMLP, ops: LayerOps) -> None:
        super().__init__()
        self._mlp, self._ops = mlp, ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        return self._mlp(self._ops, x.reshape(-1, x.shape[-1])).view(x.shape)


class RMSNorm(nn.Module):
    """A norm by Baton's own operation, with a module's call."""

    def __init__(self, norm: Norm, ops: LayerOps) -> None:
        super().__init__()
        self._norm, self._ops = norm, ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → [..., dim]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self._ops.add_norm(rows, None, self._norm.weight, self._norm.eps).view(x.shape)


# ---------------------------------------------------------------- the forms


def gated_mlp(module: nn.Module, ops: LayerOps, linears: Linears) -> FusedMLP:
    """down(activation(gate(x)) * up(x)), with the activation that fits. Raises OtherForm."""
    merged_already = hasattr(module, "gate_up_proj")  # Phi-3
    inputs = ("gate_up_proj",) if merged_already else ("gate_proj", "up_proj")
    only(module, *inputs, "down_proj", "act_fn", "activation_fn")
    _takes_one_argument(module)
    gates = [child(module, name, nn.Linear) for name in inputs]
    down = child(module, "down_proj", nn.Linear)

    def made(linears: Linears) -> FusedMLP:
        return FusedMLP(linears.merged(gates), linears.linear(down.weight.detach(), down.bias))

    exact = made(linears.exact() if linears.rounds else linears)
    x = _random_rows(gates[0].weight)
    with torch.inference_mode():
        expected = module(x)
        for activation in ACTIVATIONS:
            exact = replace(exact, activation=activation)
            if relative_difference(expected, exact(ops, x)) < TOLERANCE[x.dtype]:
                return replace(made(linears), activation=activation) if linears.rounds else exact
    raise OtherForm(f"{type(module).__name__} computes something else")


def rms_norm(module: nn.Module, ops: LayerOps) -> Norm:
    """x / rms(x) times `weight`, or times 1 + weight (Gemma). Raises OtherForm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    stranger = OtherForm(f"{type(module).__name__} is no RMS norm")
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.dim() != 1:
        raise stranger
    if hasattr(module, "bias") or list(module.children()):
        raise stranger
    _takes_one_argument(module)
    x = _random_rows(weight)
    with torch.inference_mode():
        expected = module(x)
        for factors in (weight.detach(), 1 + weight.detach()):
            found = ops.add_norm(x, None, factors, eps)
            if relative_difference(expected, found) < TOLERANCE[x.dtype]:
                return Norm(factors, eps)
    raise stranger


def _takes_one_argument(module: nn.Module) -> None:
    if len(inspect.signature(module.forward).parameters) != 1:
        raise OtherForm(f"{type(module).__name__} takes more than states")


def _random_rows(like: Tensor) -> Tensor:
    """fp32 rows as wide as the last dim of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_PROOF_ROWS, like.shape[-1], generator=generator).to(like)


def child(parent: Any, name: str, kind: type[Any]) -> Any:
    """The child of that name and type. Raises OtherForm where there is none."""
    found = getattr(parent, name, None)
    if not isinstance(found, kind):
        raise OtherForm(f"no {kind.__name__} {name} in {type(parent).__name__}")
    return found


def only(module: nn.Module, *names: str) -> None:
    """Refuse a module with other children; dropout does nothing here."""
    children = module.named_children()
    strange = {name for name, part in children if not isinstance(part, nn.Dropout)} - set(names)
    if strange:
        raise OtherForm(f"{type(module).__name__} has {', '.join(sorted(strange))}")
