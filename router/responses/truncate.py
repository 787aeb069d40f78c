"""`truncation: auto`: the oldest turns go until the conversation fits."""

from __future__ import annotations

from itertools import takewhile

from router.api_chat import ChatBody, ChatMessage
from router.chat_template import ChatOptions
from router.tokenizer import Tokenizer


async def fitted(
    body: ChatBody, tokenizer: Tokenizer, options: ChatOptions, limit: int
) -> ChatBody:
    """`body` with as many of its last turns as have at most `limit` tokens.

    What the system says stays, and the first turn that is left is a user's: a result without its
    call means nothing. If not even the last such turn fits, it stays: the error is about that.
    """
    messages = body.messages
    head = list(takewhile(lambda message: message.role in ("system", "developer"), messages))
    starts = [len(head), *_turns_of_users(messages, after=len(head))]

    async def fits(start: int) -> bool:
        return len(await tokenizer.encode_chat([*head, *messages[start:]], options)) <= limit

    low, high = 0, len(starts) - 1  # the first start that fits is among these
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    return body.model_copy(update={"messages": [*head, *messages[starts[low] :]]})


def _turns_of_users(messages: list[ChatMessage], after: int) -> list[int]:
    return [
        index for index, message in enumerate(messages) if index > after and message.role == "user"
    ]
