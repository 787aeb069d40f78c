"""The command line of `train_bundled_model.py`."""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from . import checkpoint
from .card import Facts, draft_card, target_card
from .corpus import load_corpus
from .data import Streams
from .distill import SHARES, distillation_loss, sample_stream
from .export import export
from .shapes import DRAFT, TARGET, count_parameters, make_model
from .tokenizer import encode_streams, train_tokenizer
from .train import Recipe, next_token_loss, prepare, train

TARGET_NAME, DRAFT_NAME = "baton-7m", "baton-draft"
TRAIN_SHARE = 0.88  # of all the time; the rest is the draft's
COMMAND = ["python", "scripts/train_bundled_model.py"]

DESCRIPTION = """\
Train the small model that ships with Baton, from nothing but this interpreter's standard library.

stages, each usable alone and in this order:
  tokenizer  read the library's sources, learn the BPE merges, encode everything
  train      train the target; WSD schedule: warm-up, stable, decay in the last --decay-minutes
  distill    train the draft on the target's logits
  export     write both as Hugging Face folders with model cards
  all        the four of them, --minutes in total

examples:
  python scripts/train_bundled_model.py all --minutes 120 --out baton/bundled
  python scripts/train_bundled_model.py train --minutes 60 --decay-minutes 0     # stable phase only
  python scripts/train_bundled_model.py train --resume --minutes 15 --decay-minutes 15
  python scripts/train_bundled_model.py train --minutes 5 --device cuda

Checkpoints and encoded text live in --work-dir. SIGINT or SIGTERM ends training after the current
step with a checkpoint. A process that is stopped and continued keeps its deadline.
"""


def main() -> None:
    """Run the stages that were asked for."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args)
    stages: dict[str, list[Callable[[], None]]] = {
        "tokenizer": [run.tokenizer],
        "train": [run.train],
        "distill": [run.distill],
        "export": [run.export],
        "all": [run.tokenizer, run.train, run.distill, run.export],
    }
    for stage in stages[args.stage]:
        stage()


def parse_args() -> argparse.Namespace:
    """The flags; their defaults are the recipe that made the shipped model."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["tokenizer", "train", "distill", "export", "all"])
    parser.add_argument("--minutes", type=float, default=120, help="wall clock for the stage")
    parser.add_argument("--decay-minutes", type=float, help="default: a fifth")
    parser.add_argument("--resume", action="store_true", help="go on from the stable checkpoint")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/bundled-model"))
    parser.add_argument("--out", type=Path, default=Path("baton/bundled"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--length", type=int, default=256, help="window of the stable phase")
    parser.add_argument("--sampled-tokens", type=int, default=28_000, help="text for the draft")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


class Run:
    """The stages; what one leaves for the next lies in the work directory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work_dir
        self.work.mkdir(parents=True, exist_ok=True)
        self.share = 1.0 if args.stage != "all" else TRAIN_SHARE

    def tokenizer(self) -> None:
        """Corpus to tokenizer.json and streams of token ids."""
        corpus = load_corpus()
        tokenizer = train_tokenizer(corpus.library)
        tokenizer.save(str(self.work / "tokenizer.json"))
        streams = encode_streams(tokenizer, corpus)
        save_file(streams, self.work / "streams.safetensors")
        self.log(", ".join(f"{name}: {len(ids):,} tokens" for name, ids in streams.items()))

    def train(self) -> None:
        """The target, into `work/target`."""
        self._note_command("target")
        recipe = self.recipe(self.args.minutes * self.share)
        model = self.fresh(TARGET)
        self.log(f"target: {count_parameters(model):,} parameters")
        loss_of = next_token_loss(model, recipe)
        folder = self.work / "target"
        train(model, loss_of, self.streams(), recipe, folder, self.args.resume, self.log)

    def distill(self) -> None:
        """The draft, into `work/draft`."""
        self._note_command("draft")
        began = time.monotonic()
        target, draft = self.trained("target", TARGET), self.fresh(DRAFT)
        self.log(f"draft: {count_parameters(draft):,} parameters")
        streams = self.streams()
        streams["sampled"] = sample_stream(target, streams, self.args.sampled_tokens)
        spent = (time.monotonic() - began) / 60
        self.log(f"sampled {len(streams['sampled']):,} tokens in {spent:.1f} minutes")
        share = self.share if self.share == 1.0 else 1 - self.share
        recipe = self.recipe(max(self.args.minutes * share - spent, 1.0))
        recipe = dataclasses.replace(recipe, stable_shares=SHARES, decay_shares=SHARES)
        loss_of = distillation_loss(target, draft, recipe)
        train(draft, loss_of, streams, recipe, self.work / "draft", self.args.resume, self.log)

    def export(self) -> None:
        """Both models as folders, with cards."""
        tokenizer, held_out = self.load_tokenizer(), self.streams()["held_out"]
        target, draft = self.trained("target", TARGET), self.trained("draft", DRAFT)
        folder, draft_folder = self.args.out / TARGET_NAME, self.args.out / DRAFT_NAME
        export(target, tokenizer, folder)
        export(draft, tokenizer, draft_folder)
        card = target_card(folder, target, held_out, self.facts("target"))
        (folder / "README.md").write_text(card)
        card = draft_card(draft_folder, folder, held_out, self.facts("draft"))
        (draft_folder / "README.md").write_text(card)

    def recipe(self, minutes: float) -> Recipe:
        args = self.args
        decay = minutes / 5 if args.decay_minutes is None else args.decay_minutes
        return Recipe(
            minutes=minutes,
            decay_minutes=decay,
            optimizer=args.optimizer,
            length=args.length,
            device=args.device,
            precision=args.precision,
            compile=args.compile,
        )

    def facts(self, name: str) -> Facts:
        streams = self.streams()
        notes = self.work / name / "notes.md"
        decoded = self.load_tokenizer().decode(streams["held_out"].tolist())
        return Facts(
            commands=(self.work / name / "commands.txt").read_text().splitlines(),
            notes=notes.read_text().strip() if notes.exists() else "",
            progress=checkpoint.load_progress(self.work / name / "final"),
            corpus_tokens={stream: len(ids) for stream, ids in streams.items()},
            held_out_bytes=len(decoded.encode()),
            threads=self.args.threads,
        )

    def streams(self) -> Streams:
        loaded: dict[str, Any] = load_file(self.work / "streams.safetensors")
        return {name: np.asarray(ids, dtype=np.uint16) for name, ids in loaded.items()}

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.work / "tokenizer.json"))

    def fresh(self, shape: dict[str, int]) -> Any:
        return prepare(make_model(shape), self.args.device)

    def trained(self, name: str, shape: dict[str, int]) -> Any:
        model = self.fresh(shape)
        checkpoint.load_weights(self.work / name / "final", model)
        return model.eval()

    def log(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with open(self.work / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _note_command(self, name: str) -> None:
        """Remember for the card what was typed; a run that starts anew forgets the earlier ones."""
        path = self.work / name / "commands.txt"
        path.parent.mkdir(exist_ok=True)
        earlier = path.read_text() if self.args.resume else ""
        path.write_text(earlier + shlex.join([*COMMAND, *sys.argv[1:]]) + "\n")
