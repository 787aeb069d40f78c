"""What a node owes to its routers, with links that a test reads."""

from __future__ import annotations

from typing import cast

from node.router_link import RouterLink
from node.token_outbox import TokenOutbox
from wire.logprobs import Logprobs
from wire.messages import Message
from wire.request_messages import Tokens, TokenUpdate
from wire.types import AttemptId, FinishReason

A, B, C = (AttemptId(name, 1) for name in "abc")


class FakeLink:
    """Takes messages until it is broken."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.broken = False

    def send(self, message: Message) -> bool:
        if not self.broken:
            self.sent.append(message)
        return not self.broken

    @property
    def updates(self) -> list[TokenUpdate]:
        """Of all messages so far."""
        return [u for message in self.sent if isinstance(message, Tokens) for u in message.updates]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def link() -> tuple[RouterLink, FakeLink]:
    fake = FakeLink()
    return cast(RouterLink, fake), fake


def test_a_step_becomes_one_message_per_router() -> None:
    outbox = TokenOutbox()
    (first, heard), (second, heard_too) = link(), link()
    outbox.open(A, first)
    outbox.open(B, first, base=3)
    outbox.open(C, second)
    for id in (A, B, C):
        outbox.add(id, (7,), None)
    assert not heard.sent
    outbox.flush()
    assert heard.sent == [Tokens((TokenUpdate(A, 0, (7,)), TokenUpdate(B, 3, (7,))))]
    assert heard_too.sent == [Tokens((TokenUpdate(C, 0, (7,)),))]
    outbox.flush()
    assert len(heard.sent) == 1


def test_indices_go_on() -> None:
    outbox = TokenOutbox()
    router, heard = link()
    outbox.open(A, router, base=2)
    outbox.add(A, (5,), None, 32)
    outbox.flush()
    outbox.add(A, (6, 7), FinishReason.LENGTH)
    outbox.flush()
    assert heard.updates == [
        TokenUpdate(A, 2, (5,), None, 32),
        TokenUpdate(A, 3, (6, 7), FinishReason.LENGTH),
    ]


def test_resend_from_an_index_with_the_end() -> None:
    outbox = TokenOutbox()
    router, heard = link()
    outbox.open(A, router, base=2)
    outbox.add(A, (5, 6, 7), None, 16)
    outbox.flush()
    assert outbox.resend(A, 3)
    assert heard.updates[-1] == TokenUpdate(A, 3, (6, 7), None, 16)
    outbox.add(A, (8,), FinishReason.STOP)
    outbox.flush()
    for _ in range(2):  # the end is repeated as often as it is asked for
        assert outbox.resend(A, 4)
        assert heard.updates[-1] == TokenUpdate(A, 4, (7, 8), FinishReason.STOP, 16)


def test_resend_beyond_either_end_says_what_there_is() -> None:
    outbox = TokenOutbox()
    router, heard = link()
    outbox.open(A, router, base=2)
    outbox.add(A, (5,), FinishReason.STOP)
    outbox.resend(A, 0)
    assert heard.updates[-1] == TokenUpdate(A, 2, (5,), FinishReason.STOP)
    outbox.resend(A, 9)
    assert heard.updates[-1] == TokenUpdate(A, 3, (), FinishReason.STOP)


def test_nothing_is_said_of_what_is_forgotten() -> None:
    outbox = TokenOutbox()
    router, heard = link()
    outbox.open(A, router)
    outbox.forget(A)
    outbox.forget(A)
    outbox.add(A, (1,), None)
    outbox.flush()
    assert not outbox.resend(A, 0)
    assert not heard.sent
    assert len(outbox) == 0


def test_only_old_ends_expire() -> None:
    clock = Clock()
    outbox = TokenOutbox(clock)
    router, _ = link()
    for id in (A, B):
        outbox.open(id, router)
    outbox.add(A, (1,), FinishReason.STOP)
    clock.now += 100
    outbox.add(B, (1,), FinishReason.STOP)
    outbox.open(C, router)  # runs for as long as it likes
    outbox.expire()
    assert len(outbox) == 3
    clock.now += 30
    outbox.expire()
    assert not outbox.resend(A, 0)
    assert outbox.resend(B, 0)
    clock.now += 1e6
    outbox.expire()
    assert len(outbox) == 1


def test_a_broken_link_loses_no_token() -> None:
    outbox = TokenOutbox()
    (router, heard), (other, heard_too) = link(), link()
    outbox.open(A, router)
    outbox.open(B, other)
    heard.broken = True
    outbox.add(A, (1,), None)
    outbox.add(B, (1,), None)
    outbox.flush()
    assert heard_too.updates == [TokenUpdate(B, 0, (1,))]
    heard.broken = False
    outbox.resend(A, 0)
    assert heard.updates == [TokenUpdate(A, 0, (1,))]


def test_a_lost_router_is_owed_nothing() -> None:
    outbox = TokenOutbox()
    (router, heard), (other, _) = link(), link()
    outbox.open(A, router)
    outbox.add(A, (1,), FinishReason.STOP)
    outbox.open(B, other)
    outbox.forget_router(router)
    outbox.flush()
    assert len(outbox) == 1
    assert not heard.sent


def test_logprobs_are_repeated_with_their_tokens() -> None:
    outbox = TokenOutbox()
    first, heard = link()
    outbox.open(A, first)
    told = Logprobs((b"row 0",), (b"prompt 1", b"prompt 2"))
    outbox.add(A, (7,), None, logprobs=told)
    outbox.add(A, (8,), None, logprobs=Logprobs((b"row 1",)))
    outbox.flush()
    assert [update.logprobs for update in heard.updates] == [told, Logprobs((b"row 1",))]
    outbox.resend(A, 0)
    assert heard.updates[-1].logprobs == Logprobs((b"row 0", b"row 1"), told.prompt)
    outbox.resend(A, 1)
    assert heard.updates[-1].logprobs == Logprobs((b"row 1",))


def test_who_asks_for_no_logprobs_gets_none() -> None:
    outbox = TokenOutbox()
    first, heard = link()
    outbox.open(A, first)
    outbox.add(A, (7,), None)
    outbox.resend(A, 0)
    assert heard.updates[-1].logprobs is None
