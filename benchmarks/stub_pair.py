"""A prefill and a decode node without engines in one process; their tokens come from a script.

Used by the router's tests (with scripts that make faults) and by benchmarks of the router (with
tokens that tell the time, see `stamps`).

    python -m benchmarks.stub_pair --router tcp://127.0.0.1:… --step-ms 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from benchmarks.stamps import NUM_STAMPS, stamp_tokenizer, stamping
from benchmarks.stub_node import LAYOUT, StubNode, model_info
from wire.fleet_messages import ModelInfo, TokenizerFiles
from wire.logprobs import Logprobs, TokenLogprobs, pack
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    BeamsFound,
    Embedding,
    Generate,
    Grant,
    Granted,
    Prefill,
    PrefillTiming,
    Rebind,
    Refused,
    Resend,
    Reserve,
    Tokens,
    TokenUpdate,
)
from wire.types import AttemptId, FinishReason, Hypothesis, Role

Script = Callable[[Prefill, int], tuple[int, FinishReason | None]]
"""(request, output index) → token and whether it is the last."""

# ---------------------------------------------------------------- what it tells beside tokens


def stub_row(token: int, num_top: int) -> bytes:
    """As if `token` had a probability of a half, and the ids behind it less and less."""
    top = tuple((token + i, -0.5 * (i + 1)) for i in range(num_top))
    return pack(TokenLogprobs(-0.5, 1, top))


def stub_logprobs(request: Prefill, index: int, tokens: tuple[int, ...]) -> Logprobs | None:
    """What a node tells beside `tokens`, if the request asks for it."""
    asked, asked_prompt = request.sampling.logprobs, request.sampling.prompt_logprobs
    rows = () if asked is None else tuple(stub_row(token, asked) for token in tokens)
    prompt: tuple[bytes, ...] = ()
    if asked_prompt is not None and index == 0:
        known = request.tokens[1 : request.num_prompt_tokens]
        prompt = tuple(stub_row(token, asked_prompt) for token in known)
    return Logprobs(rows, prompt) if rows or prompt else None


def stub_embedding(request: Prefill) -> bytes:
    """Four numbers that tell the pooling, the prompt's length, and its first and last token."""
    numbers = (
        request.pooling == "mean",
        len(request.tokens),
        request.tokens[0],
        request.tokens[-1],
    )
    return struct.pack("<4f", *numbers)


# ---------------------------------------------------------------- nodes


@dataclass(slots=True)
class _Running:
    """An attempt on the decode node: its output from index 0 on, and what was sent of it."""

    request: Prefill
    tokens: list[int]
    num_sent: int = 0
    finish: FinishReason | None = None

    @property
    def has_work(self) -> bool:
        return self.finish is None or self.num_sent < len(self.tokens)


class StubPair:
    """A prefill and a decode node whose handoff is a function call.

    Args:
        script: makes the tokens.
        step_s: time between two steps of the decode node.
        updates_per_message: a step's tokens are spread over messages of this many requests, and
            these over the step's time, as if they came from several nodes.
        together: the decode node's first step waits until so many requests run.
    """

    def __init__(
        self,
        router_url: str,
        script: Script,
        model: ModelInfo,
        tokenizer: TokenizerFiles,
        *,
        step_s: float = 0.001,
        updates_per_message: int = 32,
        together: int = 0,
        name: str = "",
    ) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        common = (router_url, model, tokenizer, self._context)
        self.prefill = StubNode(Role.PREFILL, *common, name=f"prefill{name}")
        self.decode = StubNode(Role.DECODE, *common, name=f"decode{name}")
        self.prefill.handle = self.on_prefill_message
        self.decode.handle = self.on_decode_message
        self.peers = [self]  # pairs whose decode nodes this prefill node can reach
        self.running: dict[AttemptId, _Running] = {}
        self.num_cached_tokens = 0
        self.refuse_with: str | None = None  # refuse reservations for this cause
        self.timing: PrefillTiming | None = None  # what the prefill node says of its time
        self.prefill_hangs = False  # no first token ever comes
        self.silent_after: int | None = None  # the decode node stops after so many output tokens
        self._script = script
        self._step_s = step_s
        self._updates_per_message = updates_per_message
        self._together = together
        self._steps = asyncio.create_task(self._run())

    async def ready(self) -> None:
        """Wait until both nodes are registered."""
        while not (self.prefill.registered and self.decode.registered):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self._steps.cancel()
        await asyncio.gather(self._steps, return_exceptions=True)
        await self.prefill.close()
        await self.decode.close()
        self._context.destroy(linger=0)

    # ------------------------------------------------------------ messages

    def on_decode_message(self, message: Message) -> None:
        if isinstance(message, Reserve | Rebind):
            self._answer(message.id)
        elif isinstance(message, Generate):
            self._serve_alone(message)
        elif isinstance(message, Abort | Ack):
            self.running.pop(message.id, None)
        elif isinstance(message, Resend) and message.id in self.running:
            self.running[message.id].num_sent = message.index

    def _answer(self, id: AttemptId) -> None:
        if self.refuse_with is not None:
            self.decode.send(Refused(id, self.refuse_with, "no room in the stub", 0.05))
        else:
            self.decode.send(Granted(id, self._grant()))

    def _serve_alone(self, message: Generate) -> None:
        if self.refuse_with is not None:
            self.decode.send(Refused(message.id, self.refuse_with, "no room in the stub", 0.05))
            return
        known = message.tokens[message.num_prompt_tokens :]
        self.decode.send(Tokens((TokenUpdate(message.id, 0, known),)))
        prompt = (message.tokens, message.num_prompt_tokens)
        request = Prefill(message.id, *prompt, message.sampling, None, message.cache_salt)
        self.running[message.id] = _Running(request, list(known), len(known))

    def _grant(self) -> Grant:
        secret = bytes(16)
        return Grant(1, secret, secret, self.decode.id, "tcp://stub", (), LAYOUT, (), 0, 10.0)

    def on_prefill_message(self, message: Message) -> None:
        if isinstance(message, Prefill) and not self.prefill_hangs:
            self._first_token(message)
        elif isinstance(message, Abort):
            self.running.pop(message.id, None)

    def _first_token(self, request: Prefill) -> None:
        if request.pooling is not None:
            vector = stub_embedding(request)
            self.prefill.send(Embedding(request.id, vector, self.num_cached_tokens, self.timing))
            return
        if request.sampling.beam is not None:
            self._search(request)
            return
        known = list(request.tokens[request.num_prompt_tokens :])
        token, finish = self._script(request, len(known))
        logprobs = stub_logprobs(request, len(known), (token,))
        update = TokenUpdate(
            request.id,
            len(known),
            (token,),
            finish,
            self.num_cached_tokens,
            logprobs,
            self.timing,
        )
        self.prefill.send(Tokens((update,)))
        if finish is None and request.grant is not None:
            for pair in self.peers:
                if pair.decode.id == request.grant.decode:
                    pair.running[request.id] = _Running(request, [*known, token])

    def _search(self, request: Prefill) -> None:
        """Hypotheses that say what the script says, behind their rank as a letter."""
        assert request.sampling.beam is not None
        begun = TokenUpdate(request.id, 0, (), None, self.num_cached_tokens, None, self.timing)
        self.prefill.send(Tokens((begun,)))
        tokens: list[int] = []
        finish: FinishReason | None = None
        while finish is None:
            token, finish = self._script(request, len(tokens))
            tokens.append(token)
        found = BeamsFound(
            request.id,
            tuple(
                Hypothesis((ord("A") + rank, *tokens[1:]), -1.0 - rank, finish)
                for rank in range(request.sampling.beam.width)
            ),
        )
        if request.grant is None:
            self.prefill.send(found)
            return
        self.decode.send(Tokens((TokenUpdate(request.id, 0, ()),)))
        self.decode.send(found)

    # ------------------------------------------------------------ steps

    async def _run(self) -> None:
        while True:
            begin = time.monotonic()
            active = [run for run in self.running.values() if run.has_work]
            if not self._may_step(active):
                active = []
            size = self._updates_per_message
            groups = [active[start : start + size] for start in range(0, len(active), size)]
            for group in groups:
                self._step(group)
                await asyncio.sleep(self._step_s / len(groups))
            await asyncio.sleep(max(0.0005, begin + self._step_s - time.monotonic()))

    def _may_step(self, active: list[_Running]) -> bool:
        """Those that run together have all begun."""
        begun = any(run.num_sent for run in active)
        return begun or len(active) >= self._together

    def _step(self, group: list[_Running]) -> None:
        """One more token for each of `group`; a holder's first message repeats all before it."""
        updates = []
        for run in group:
            index = len(run.tokens)
            silent = self.silent_after is not None and index >= self.silent_after
            if run.finish is None and not silent:
                token, run.finish = self._script(run.request, index)
                run.tokens.append(token)
            new = tuple(run.tokens[run.num_sent :])
            if new:
                told = stub_logprobs(run.request, run.num_sent, new)
                update = TokenUpdate(run.request.id, run.num_sent, new, run.finish, logprobs=told)
                updates.append(update)
                run.num_sent = len(run.tokens)
        if updates:
            self.decode.send(Tokens(tuple(updates)))


# ---------------------------------------------------------------- as a process


async def serve(router_url: str, step_s: float, updates_per_message: int, together: int) -> None:
    """Run one pair whose tokens tell the time, until cancelled."""
    pair = StubPair(
        router_url,
        stamping,
        model_info(NUM_STAMPS, max_model_len=1 << 20),
        stamp_tokenizer(),
        step_s=step_s,
        updates_per_message=updates_per_message,
        together=together,
    )
    try:
        await pair.ready()
        print("stub ready", flush=True)
        await asyncio.Event().wait()
    finally:
        await pair.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", required=True, help="the router's control address")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time between tokens")
    parser.add_argument("--updates-per-message", type=int, default=32)
    parser.add_argument("--together", type=int, default=0, help="no step before so many run")
    args = parser.parse_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(
            serve(args.router, args.step_ms / 1000, args.updates_per_message, args.together)
        )


if __name__ == "__main__":
    main()
