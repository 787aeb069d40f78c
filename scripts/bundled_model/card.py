"""The model cards: everything in them is measured or produced while they are written."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoint import Progress
from .measure import agreement, bits_per_byte, held_out_loss, loss_by_position
from .shapes import count_parameters
from .tokenizer import VOCAB_SIZE

COMPLETIONS = [
    "def fibonacci(n):\n",
    "import os\n\ndef find_files(directory, suffix):\n",
    "class Connection:\n    def __init__(self, host, port):\n",
]
QUESTIONS = ["Hello!", "Write a function to reverse a string.", "What is the module `json` for?"]
NEW_TOKENS = 96

LIMITS = """\
## Limits

It exists so that a serving system can be tried, tested and measured on a laptop with a real model
and no network. It writes text that is recognisably Python and often parses; it does not reason, its
code is rarely correct beyond what the library contains, and it knows English only from comments,
docstrings and help texts. Being small and trained over its corpus several times it can repeat
passages of the library word for word. About a hundred everyday questions (greetings, Fibonacci,
sorting) were answered by hand and are part of the training text, so good answers to those are
recall. Contexts beyond 2,048 tokens were never trained. Do not use it for anything but
demonstrations and tests.

## Licence

Apache-2.0 for the weights. The training text is the Python standard library, which is under the PSF
licence.
"""


@dataclass(frozen=True)
class Facts:
    """What the cards tell about how the models were made."""

    commands: list[str]
    notes: str  # what the commands do not tell, written by whoever ran them
    progress: Progress
    corpus_tokens: Mapping[str, int]
    held_out_bytes: int
    threads: int


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The exported folder as a user gets it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def target_card(folder: Path, trained: Any, held_out: Any, facts: Facts) -> str:
    """README.md of the target; `trained` holds the weights before they were cut to 16 bit."""
    model = load(folder)
    loss = held_out_loss(model, held_out)
    rows = {
        "parameters": f"{count_parameters(model):,} (embedding tied)",
        "shape": _shape(model.config),
        "context": f"{model.config.max_position_embeddings:,} tokens",
        "tokenizer": f"byte-level BPE, {VOCAB_SIZE:,} entries, "
        f"{facts.held_out_bytes / len(held_out):.2f} bytes per token on held-out files",
        "held-out loss": f"{loss:.4f} nats per token, "
        f"{bits_per_byte(loss, len(held_out), facts.held_out_bytes):.3f} bits per byte "
        f"({len(held_out):,} tokens, windows of 512)",
        "the same before rounding to fp16": f"{held_out_loss(trained, held_out):.5f}",
        "the same if rounded to bf16": f"{held_out_loss(_as_bf16(folder), held_out):.5f}",
        "tokens seen": f"{facts.progress.tokens:,} in {facts.progress.step:,} steps",
        "training time": f"{facts.progress.seconds / 60:.0f} minutes on {_machine(facts.threads)}",
    }
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {folder.name}

The small language model that ships with Baton: a Llama that completes Python and answers short
questions in chat form.

{_table(rows)}

## Data

The Python {platform.python_version()} standard library, by tokens:

{_table(_streams(facts))}

About one library file in thirty-three, chosen by the hash of its path, is held out.

## How it was made

{_commands(facts.commands)}

{facts.notes}

Muon for the matrices of the layers, AdamW for the rest; warm-up, stable phase, linear decay. The
decay leaves the tests out. Most steps read windows of 256 tokens; one of 32, in the decay one of
four, reads windows of 2,048.

## Loss by position

Nats per token on held-out files, by how many tokens came before (windows of 2,048):

{_table(loss_by_position(model, held_out))}

## Samples

Greedy, {NEW_TOKENS} tokens, not selected.

{_samples(model, folder)}
{LIMITS}"""


def draft_card(folder: Path, target_folder: Path, held_out: Any, facts: Facts) -> str:
    """README.md of the draft."""
    draft, target = load(folder), load(target_folder)
    loss = held_out_loss(draft, held_out)
    same, overlap = agreement(target, draft, held_out)
    rows = {
        "parameters": f"{count_parameters(draft):,} (embedding tied)",
        "shape": _shape(draft.config),
        "tokenizer": f"that of {target_folder.name}, byte for byte",
        "held-out loss": f"{loss:.4f} nats per token, "
        f"{bits_per_byte(loss, len(held_out), facts.held_out_bytes):.3f} bits per byte",
        "best token is the target's": f"{same:.1%} of held-out positions",
        "overlap with the target": f"{overlap:.1%} (the acceptance rate of speculative sampling)",
        "tokens seen": f"{facts.progress.tokens:,} in {facts.progress.step:,} steps",
        "training time": f"{facts.progress.seconds / 60:.0f} minutes on {_machine(facts.threads)}",
    }
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {folder.name}

The draft for speculative decoding with {target_folder.name}: it proposes, the target decides. It
learned nothing but the target's distribution (KL divergence), over the target's corpus and over
text sampled from the target.

{_table(rows)}

## How it was made

{_commands(facts.commands)}

{facts.notes}

## Sample

What it writes alone, greedy, {NEW_TOKENS} tokens:

{_samples(draft, target_folder, COMPLETIONS[:1], [])}
{LIMITS}"""


def _shape(config: Any) -> str:
    return (
        f"{config.hidden_size} wide, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} K/V heads of "
        f"{config.head_dim}, MLP {config.intermediate_size}"
    )


def _samples(
    model: Any,
    folder: Path,
    completions: list[str] = COMPLETIONS,
    questions: list[str] = QUESTIONS,
) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = [
        f"````python\n{prompt}{_complete(model, tokenizer, prompt)}\n````\n"
        for prompt in completions
    ]
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        answer = _complete(model, tokenizer, prompt)
        blocks.append(f"> {question}\n\n````text\n{answer}\n````\n")
    return "\n".join(blocks)


def _complete(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
    text: str = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.rstrip()


def _as_bf16(folder: Path) -> Any:
    return load(folder, torch.bfloat16).float()


def _streams(facts: Facts) -> dict[str, str]:
    contents = {
        "library": "sources without tests",
        "chat": "questions and answers made of its functions, classes, docstrings and help topics",
        "tests": "its test suite, in the stable phase only",
        "everyday": "hand-written answers to everyday questions, eight times over",
    }
    return {what: f"{facts.corpus_tokens[name]:,}" for name, what in contents.items()}


def _table(rows: Mapping[str, Any]) -> str:
    cells = (
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in rows.items()
    )
    return "\n".join(["| | |", "|---|---|", *cells])


def _commands(commands: list[str]) -> str:
    return "\n".join(["```sh", *commands, "```"])


def _machine(threads: int) -> str:
    """The class of the processor, nothing more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{threads} thread{'s' if threads > 1 else ''} of an {name} processor"
