"""What is kept of responses, so that later ones can go on from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from router.responses.items import Json


class NotStored(LookupError):
    """There is no such response, or it is another owner's, or it has expired."""

    def __init__(self, id: str) -> None:
        super().__init__(f"no response {id} is stored")
        self.id = id


class ChainTooLong(ValueError):
    """More responses, or larger ones, precede than one request may bring with it."""


class StoreFailed(Exception):
    """The store cannot be read or written now; the text says why."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended, and the input that it answered.

    Args:
        owner: only requests of the same owner find it.
        previous: the id of the response that it goes on from.
    """

    id: str
    owner: str
    previous: str | None
    response: Json
    input: list[Json]


class ResponseStore(Protocol):
    """Keeps responses for a while; several router processes may share one.

    A response expires when neither it nor one that goes on from it was used for a time. All may
    raise StoreFailed.
    """

    async def put(self, stored: StoredResponse) -> None:
        """Keep it. Others that have expired go, and the oldest where there is no room."""
        ...

    async def get(self, id: str, owner: str) -> StoredResponse:
        """Raises NotStored."""
        ...

    async def chain(self, id: str, owner: str) -> list[StoredResponse]:
        """The response and all before it, the oldest first. Raises NotStored, ChainTooLong."""
        ...

    async def delete(self, id: str, owner: str) -> None:
        """Raises NotStored."""
        ...

    async def close(self) -> None:
        """Nothing is asked for any more."""
        ...
