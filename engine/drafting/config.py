"""`--speculative-config`: JSON with vLLM's field names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.errors import ConfigError

HEADS = ("eagle", "eagle3", "mtp")
METHODS = ("none", "ngram", "draft_model", *HEADS)
OTHER_NAMES = {"deepseek_mtp": "mtp", "glm4_moe_mtp": "mtp"}
"""What vLLM calls some of them by model; it takes the method's own name too."""
MAX_DRAFT = 32


def _check(holds: bool, mistake: str) -> None:
    if not holds:
        raise ConfigError(f"--speculative-config: {mistake}")


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Who drafts, and how many tokens at most."""

    method: str = "none"
    model: Path | None = None  # who drafts; of mtp where it is not in the model's own folder
    num_speculative_tokens: int = 5
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        _check(self.method in METHODS, f"method must be one of {', '.join(METHODS)}")
        needs = self.method in ("draft_model", "eagle", "eagle3")
        _check(self.model is not None or not needs, f"{self.method} needs model, a folder")
        takes = needs or self.method == "mtp"
        _check(self.model is None or takes, f"model does not go with the method {self.method}")
        in_range = 1 <= self.num_speculative_tokens <= MAX_DRAFT
        _check(in_range, f"num_speculative_tokens must be between 1 and {MAX_DRAFT}")
        _check(
            1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MAX_DRAFT,
            f"prompt_lookup_min and prompt_lookup_max must go from 1 to {MAX_DRAFT}, in order",
        )

    @property
    def words(self) -> str:
        """What a node tells of it: `ngram, up to 5 tokens`; nothing where nobody drafts."""
        if self.method == "none":
            return ""
        model = "" if self.model is None else f" {self.model.name[:200]}"
        return f"{self.method}{model}, up to {self.num_speculative_tokens} tokens"


NO_SPECULATION = SpeculativeConfig()
_TYPES: dict[str, type] = {
    "method": str,
    "model": str,
    "num_speculative_tokens": int,
    "prompt_lookup_min": int,
    "prompt_lookup_max": int,
}


def parse_speculative_config(text: str) -> SpeculativeConfig:
    """The config that the JSON object describes; empty is none. Raises ConfigError."""
    if not text.strip():
        return NO_SPECULATION
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--speculative-config is not JSON: {error}") from error
    _check(isinstance(fields, dict), "it must be a JSON object")
    unknown = sorted(set(fields) - set(_TYPES))
    _check(not unknown, f"unknown: {', '.join(unknown)}; known are {', '.join(_TYPES)}")
    for name, value in fields.items():
        wanted = _TYPES[name]
        _check(type(value) is wanted, f"{name} must be {_words(wanted)}, not {value!r:.80}")
    return SpeculativeConfig(**_completed(fields))


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """With the method that a model alone implies, and one lookup length where one is given."""
    fields = dict(fields)
    if "model" in fields:
        fields.setdefault("method", "draft_model")
        fields["model"] = Path(fields["model"])
    if "method" in fields:
        fields["method"] = OTHER_NAMES.get(fields["method"], fields["method"])
    for given, other in (("min", "max"), ("max", "min")):
        if f"prompt_lookup_{given}" in fields:
            fields.setdefault(f"prompt_lookup_{other}", fields[f"prompt_lookup_{given}"])
    _check("method" in fields, f"method is missing, one of {', '.join(METHODS)}")
    return fields


def _words(wanted: type) -> str:
    return "a whole number" if wanted is int else "a string"
