"""Log-probabilities of what a step sampled and of prompts: log-softmax of the model's raw logits.

Raw means before min_tokens, bias, penalties, temperature and filters (vLLM's default). A chunk of a
prompt whose logprobs are asked for has logits at each of its positions:

    positions   start .......... end - 1
    token told  start + 1 ...... end        the last one, at the prompt's end, is the sampled one

Rows are packed part by part and the logits forgotten with the step, so what is held for a prompt is
8 (1 + k) bytes per token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import torch
from torch import Tensor

from engine.plan import ScheduledRequest, StepPlan
from engine.rows import accepted
from engine.sampler import finite_rows
from wire.logprobs import PAIR_BYTES, Logprobs

_PART = 64  # rows of which a copy is made at a time


def sampling_logits(plan: StepPlan, logits: Tensor) -> Tensor:
    """Of the logits of a step, [rows, V], those from which tokens are sampled, [R, V]."""
    if logits.shape[0] == plan.num_samples:
        return logits
    ends: list[int] = []
    row = 0
    for item in plan.scheduled:
        row += item.num_logits
        ends += range(row - item.num_samples, row)
    return logits[ends]


def corrupted_prompts(plan: StepPlan, logits: Tensor) -> frozenset[str]:
    """Requests with broken logits in the part of the prompt whose logprobs they ask for."""
    if logits.shape[0] == plan.num_samples:
        return frozenset()
    sound, row, found = finite_rows(logits).tolist(), 0, set()
    for item in plan.scheduled:
        told = item.request.wants_prompt_logprobs
        if told and not all(sound[row : row + item.num_logits]):
            found.add(item.request.request_id)
        row += item.num_logits
    return frozenset(found)


def step_logprobs(
    plan: StepPlan, logits: Tensor, tokens: Sequence[int], corrupted: Collection[str] = ()
) -> dict[str, Logprobs]:
    """By request: the logprobs of its new tokens and of its chunk, for those who ask.

    `tokens` are what all rows sampled; those of accepted draft tokens are told too.
    """
    if not any(_asks(item) for item in plan.scheduled):
        return {}
    sampled, row, found = iter(tokens), 0, {}
    for item in plan.scheduled:
        new = accepted(item.draft_tokens, tuple(islice(sampled, item.num_samples)))
        if _asks(item) and item.request.owner.request_id not in corrupted:
            mine = logits[row : row + item.num_logits]
            found[item.request.request_id] = _of_request(item, mine, new)
        row += item.num_logits
    return found


def _asks(item: ScheduledRequest) -> bool:
    of_token = item.samples and item.request.num_top_logprobs is not None
    return of_token or item.request.wants_prompt_logprobs


def _of_request(item: ScheduledRequest, logits: Tensor, new: tuple[int, ...]) -> Logprobs:
    request, sampling = item.request, item.request.sampling
    prompt: list[bytes] = []
    if request.wants_prompt_logprobs:
        told = request.tokens[item.start + 1 : item.end + 1]
        prompt = pack_rows(logits[: len(told)], told, sampling.prompt_logprobs or 0)
    rows: list[bytes] = []
    if new and request.num_top_logprobs is not None:
        first = item.num_logits - item.num_samples
        rows = pack_rows(logits[first : first + len(new)], new, request.num_top_logprobs)
    return Logprobs(tuple(rows), tuple(prompt))


def pack_rows(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[bytes]:
    """Packed rows (wire/logprobs.py) for `tokens`, one per row of logits [R, V]."""
    rows: list[bytes] = []
    width = PAIR_BYTES * (1 + min(num_top, logits.shape[-1]))
    for start in range(0, len(tokens), _PART):
        data = _pack(logits[start : start + _PART], tokens[start : start + _PART], num_top)
        rows += [data[i : i + width] for i in range(0, len(data), width)]
    return rows


def _pack(logits: Tensor, tokens: Sequence[int], num_top: int) -> bytes:
    ids = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    chosen = logits.gather(1, ids)
    rank = 1 + (logits > chosen).sum(-1, keepdim=True)
    top = logits.topk(min(num_top, logits.shape[-1]))
    numbers = torch.cat([rank, top.indices], 1).int()
    logprobs = torch.cat([chosen, top.values], 1) - logits.logsumexp(-1, keepdim=True)
    logprobs.clamp_(max=0)  # rounding may leave a certain token above
    pairs = torch.stack([numbers, logprobs.view(torch.int32)], -1)
    return bytes(pairs.cpu().numpy().astype("<i4", copy=False).tobytes())
