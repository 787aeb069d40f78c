"""A latency model in a file, bound to the model and the device that it was measured on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuner.files import write_text
from tuner.latency import LatencyModel
from tuner.overheads import NO_OVERHEADS, Overheads
from tuner.report import percentile
from wire.errors import ConfigError
from wire.layout import KVLayout

SCHEMA = "baton.profile/1"


@dataclass(frozen=True, slots=True)
class FitError:
    """How far the formula is from the samples that it was fitted to; relative."""

    num_samples: int
    p50: float
    p90: float


def fit_error(errors: list[float]) -> FitError:
    ordered = sorted(errors)
    return FitError(len(ordered), percentile(ordered, 0.5), percentile(ordered, 0.9))


@dataclass(frozen=True, slots=True)
class Profile:
    """What one engine takes, and what it is."""

    model_name: str
    model_fingerprint: str
    device: str  # processor, threads and data type, in words: equal text, equal speed
    max_model_len: int
    layout: KVLayout
    latency: LatencyModel
    errors: dict[str, FitError]  # by formula
    overheads: Overheads = NO_OVERHEADS  # of a fleet, where one was asked
    spread: dict[str, float] = field(default_factory=dict)  # of repeats, relative, by what it was

    def check(self, *, model_fingerprint: str, device: str) -> None:
        """Raise ConfigError where the profile is another model's or another device's."""
        if self.model_fingerprint != model_fingerprint:
            raise ConfigError(
                f"the profile is of model {self.model_name} ({self.model_fingerprint}), not of "
                f"{model_fingerprint}; make one with `baton profile`"
            )
        if self.device != device:
            raise ConfigError(
                f"the profile was made on {self.device!r}, this is {device!r}; "
                "make one here with `baton profile`"
            )


def save_profile(profile: Profile, path: Path) -> None:
    write_text(path, json.dumps({"schema": SCHEMA, **asdict(profile)}, indent=2) + "\n")


def load_profile(path: Path) -> Profile:
    """Raises ConfigError for what is no profile."""
    try:
        entry = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is not a profile ({SCHEMA}); make one with `baton profile`")
    try:
        return _profile(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error


def _profile(entry: dict[str, Any]) -> Profile:
    latency = entry["latency"]
    return Profile(
        model_name=str(entry["model_name"]),
        model_fingerprint=str(entry["model_fingerprint"]),
        device=str(entry["device"]),
        max_model_len=int(entry["max_model_len"]),
        layout=KVLayout(**entry["layout"]),
        latency=LatencyModel(
            prefill=_coefficients(latency["prefill"], 3),
            decode=_coefficients(latency["decode"], 3),
            transfer=_coefficients(latency["transfer"], 2),
        ),
        errors={name: FitError(**error) for name, error in entry["errors"].items()},
        overheads=Overheads(**entry.get("overheads", {})),
        spread={str(name): float(value) for name, value in entry.get("spread", {}).items()},
    )


def _coefficients(values: list[Any], size: int) -> Any:
    found = tuple(float(value) for value in values)
    if len(found) != size or not all(0 <= value < float("inf") for value in found):
        raise ValueError(f"{values} are not {size} coefficients")
    return found
