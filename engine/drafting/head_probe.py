"""Tries a head on a few rows, so that what does not work shows when it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.from_transformers import first_line
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from wire.errors import ConfigError
from wire.types import SamplingParams

BLOCK_SIZE = 4
NUM_ROWS = 6


@torch.inference_mode()
def probe_head(head: LoadedModel, folder: Path) -> None:
    """Raises ConfigError where the head does not compute, or not what the target's tokens are."""
    runner = ModelRunner(head, KVStore(head.kv_layout(BLOCK_SIZE), 2, head.device))
    request = Request("probe", [1] * NUM_ROWS, NUM_ROWS, SamplingParams(), NUM_ROWS + 1)
    request.block_table = [1, 0]
    entry = head.model.entry
    plan = StepPlan((ScheduledRequest(request, 0, NUM_ROWS),))
    try:
        states = torch.zeros(NUM_ROWS, entry.state_size, dtype=head.dtype, device=head.device)
        output = runner.prepare(plan)(states=entry.combined(states))
        shapes = [tuple(output.logits.shape), tuple(output.states.shape)]
    except Exception as error:  # whatever a layer of a foreign kind does
        raise ConfigError(
            f"{folder}: the head's forward pass fails: {first_line(error)}"
        ) from error
    if shapes != [(1, 1, head.vocab_size), (1, head.model.width)]:
        raise ConfigError(f"{folder}: the head gives logits and states of shapes {shapes}")
