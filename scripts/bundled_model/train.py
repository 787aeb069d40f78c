"""Training of the target: warm-up, stable, decay (WSD), measured against the held-out files.

The stable phase can go on for as long as there is time; whoever wants a model now starts a decay
from its last checkpoint. Most tokens are read in short windows, where attention costs little; the
decay mixes in windows of the full context, so that the rotary positions are all trained.

The forward pass runs in bfloat16 (autocast) over fp32 weights: on a CPU with AVX512-BF16 matrix
products are five times as fast as in fp32 (520 against 100 GFLOP/s on one thread). `--precision
fp32` is for those without.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint
from .checkpoint import Progress
from .data import Mixture, Streams, parts
from .measure import held_out_loss

STABLE_SHARES = {"library": 0.69, "tests": 0.06, "chat": 0.23, "everyday": 0.02}
DECAY_SHARES = {"library": 0.68, "chat": 0.24, "everyday": 0.08}
WARMUP_STEPS = 100
FINAL_LR_FACTOR = 0.02
MAX_STEP_SECONDS = 30.0  # a longer step was a stopped process, not work
GLANCE_TOKENS = 4096  # enough to see the trend; the whole held-out text takes a minute


@dataclass(frozen=True)
class Recipe:
    """What a training run may vary."""

    minutes: float  # wall clock of this sitting
    decay_minutes: float  # its last part; 0 only goes on with the stable phase
    optimizer: str = "muon"
    lr: float = 0.02
    lr_embedding: float = 0.003
    weight_decay: float = 0.05
    step_tokens: int = 8192
    micro_tokens: int = 2048
    length: int = 256
    long_length: int = 2048
    long_every: int = 32  # one step of so many reads long windows, which take four times as long
    long_every_in_decay: int = 4
    stable_shares: Mapping[str, float] = field(default_factory=lambda: STABLE_SHARES)
    decay_shares: Mapping[str, float] = field(default_factory=lambda: DECAY_SHARES)
    device: str = "cpu"
    precision: str = "bf16"
    compile: bool = True
    seed: int = 0


@dataclass
class Clock:
    """Where the run is between its start and its deadline."""

    recipe: Recipe
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    @property
    def remaining(self) -> float:
        return self.recipe.minutes * 60 - (time.monotonic() - self.started)

    @property
    def over(self) -> bool:
        return self.stopped or self.remaining <= 0

    @property
    def decaying(self) -> bool:
        return self.recipe.decay_minutes > 0 and self.remaining < self.recipe.decay_minutes * 60

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then one, then down to nearly nothing at the deadline."""
        if self.decaying:
            left = max(self.remaining, 0) / (self.recipe.decay_minutes * 60)
            return FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * left
        return min(1.0, (step + 1) / WARMUP_STEPS)

    def stop_on_signals(self) -> None:
        """End after the current step, with a checkpoint, when asked to."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "stopped", True))


LossFunction = Callable[[torch.Tensor], torch.Tensor]  # windows [B, T + 1] -> mean loss
Log = Callable[[str], None]


def train(
    model: Any,
    loss_of: LossFunction,
    streams: Streams,
    recipe: Recipe,
    work: Path,
    resume: bool,
    log: Log,
) -> None:
    """Train for `recipe.minutes`.

    `work/stable` is the checkpoint to resume from, `work/final` the model as it is now: its weights
    are rewritten at every evaluation, so there is a usable model at any time.
    """
    optimizers = make_optimizers(model, recipe)
    progress = checkpoint.load(work / "stable", model, optimizers) if resume else Progress()
    clock = Clock(recipe)
    clock.stop_on_signals()
    loss_of = torch.compile(loss_of, dynamic=False) if recipe.compile else loss_of
    report = Reporter(model, streams, recipe, work, optimizers, log)
    while not clock.over:
        began = time.monotonic()
        loss = _step(loss_of, optimizers, streams, recipe, clock, progress)
        progress.step += 1
        progress.tokens += recipe.step_tokens
        progress.seconds += min(time.monotonic() - began, MAX_STEP_SECONDS)
        report.after_step(progress, clock, loss)
    report.finish(progress, clock)


def _step(
    loss_of: LossFunction,
    optimizers: list[torch.optim.Optimizer],
    streams: Streams,
    recipe: Recipe,
    clock: Clock,
    progress: Progress,
) -> float:
    """One optimizer step over several micro-batches that fit the cache; returns the mean loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * clock.lr_factor(progress.step)
    total = 0.0
    batches = list(_micro_batches(streams, recipe, clock.decaying, progress.step))
    for batch in batches:
        loss = loss_of(batch) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    for optimizer in optimizers:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return total


def _micro_batches(
    streams: Streams, recipe: Recipe, decaying: bool, step: int
) -> Iterator[torch.Tensor]:
    mixture = Mixture(
        streams, recipe.decay_shares if decaying else recipe.stable_shares, recipe.seed
    )
    long_every = recipe.long_every_in_decay if decaying else recipe.long_every
    length = recipe.long_length if step % long_every == 0 else recipe.length
    batch = mixture.batch(step, recipe.step_tokens // length, length)
    for rows in parts(batch, recipe.micro_tokens // length):
        yield rows.to(recipe.device)


# -- parts ---------------------------------------------------------------------------------------


def prepare(model: Any, device: str) -> Any:
    """On a CPU plain attention compiles to faster code than SDPA (6,200 against 5,100 tokens/s)."""
    model.to(device)
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    return model


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for embedding and norms; Muon, or AdamW as well, for the matrices of the layers."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    adam: dict[str, Any] = {"betas": (0.9, 0.95), "fused": True}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.lr_embedding, weight_decay=0.0, **adam)
    ]
    if recipe.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay)
        optimizers.append(muon)
    else:
        adamw = torch.optim.AdamW(
            matrices, lr=recipe.lr_embedding, weight_decay=recipe.weight_decay, **adam
        )
        optimizers.append(adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def next_token_loss(model: Any, recipe: Recipe) -> LossFunction:
    """Mean cross entropy."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = forward(model, batch[:, :-1], recipe)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return loss_of


def forward(model: Any, inputs: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """fp32 logits [B, T, vocabulary]."""
    kind = torch.device(recipe.device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits: torch.Tensor = F.linear(hidden, model.lm_head.weight)
    return logits.float()


@dataclass
class Reporter:
    """Writes the log lines and the checkpoints."""

    model: Any
    streams: Streams
    recipe: Recipe
    work: Path
    optimizers: list[torch.optim.Optimizer]
    log: Log
    log_every: int = 20
    save_every_seconds: float = 300.0
    _saved_at: float = field(default_factory=time.monotonic)
    _losses: list[float] = field(default_factory=list)
    _decay_began: bool = False
    _mark: tuple[float, int] | None = None

    def after_step(self, progress: Progress, clock: Clock, loss: float) -> None:
        self._losses.append(loss)
        if progress.step % self.log_every == 0:
            mean = sum(self._losses) / len(self._losses)
            lr = clock.lr_factor(progress.step)
            self.log(
                f"step {progress.step} tokens {progress.tokens / 1e6:.2f}M loss {mean:.3f} "
                f"lr x{lr:.2f} {self._rate(progress):.0f} tokens/s, "
                f"{clock.remaining / 60:.1f} min left"
            )
            self._losses, self._mark = [], (progress.seconds, progress.tokens)
        if clock.decaying and not self._decay_began:
            self._decay_began = True
            checkpoint.save(self.work / "stable", self.model, self.optimizers, progress)
        if time.monotonic() - self._saved_at > self.save_every_seconds:
            self._save(progress, clock)
            loss = held_out_loss(self.model, self.streams["held_out"][:GLANCE_TOKENS])
            self.log(f"held-out loss {loss:.3f} (first {GLANCE_TOKENS} tokens)")
            self._saved_at = time.monotonic()

    def _rate(self, progress: Progress) -> float:
        """Tokens per second since the last line."""
        seconds, tokens = self._mark or (0.0, 0)
        return (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)

    def finish(self, progress: Progress, clock: Clock) -> None:
        self._save(progress, clock)
        loss = held_out_loss(self.model, self.streams["held_out"])
        self.log(f"done: step {progress.step}, held-out loss {loss:.4f} nats/token")

    def _save(self, progress: Progress, clock: Clock) -> None:
        """A decaying model must not overwrite the stable one: its learning rate is spent."""
        if not clock.decaying:
            checkpoint.save(self.work / "stable", self.model, self.optimizers, progress)
        checkpoint.save(self.work / "final", self.model, [], progress)
