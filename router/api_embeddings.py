"""The body of an embeddings request; see `router/api.py`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from router.api import Prompt, PromptInput, as_prompts
from router.api_structured import Strict
from router.parsing import json_object, validate, without_neutral

MAX_INPUTS = 2048
"""As OpenAI has it."""


class EmbeddingBody(Strict):
    """POST /v1/embeddings."""

    input: Annotated[
        list[Prompt],
        PlainValidator(partial(as_prompts, limit=MAX_INPUTS), json_schema_input_type=PromptInput),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 20)] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    user: str | None = None  # a label


NEUTRAL_EMBEDDING: dict[str, tuple[Any, ...]] = {
    "additional_data": (),
    "embed_dtype": ("float32",),
    "endianness": ("little", "native"),
    "normalize": (True,),
    "request_id": (),
    "truncate_prompt_tokens": (),
}


def parse_embedding(data: bytes) -> EmbeddingBody:
    """Raises ApiError."""
    return validate(EmbeddingBody, without_neutral(json_object(data), NEUTRAL_EMBEDDING))
