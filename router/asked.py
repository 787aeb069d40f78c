"""A request that was found valid, before any of its choices exists."""

from __future__ import annotations

from dataclasses import dataclass

from router.chunks import TokenDetails
from router.logprobs import TokenNames
from router.params import GenerationParams
from router.prompts import ReadyPrompt
from router.tokenizer import Tokenizer
from telemetry.timeline import Timeline
from wire.fleet_messages import ModelInfo


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a request found when it arrived."""

    info: ModelInfo
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What one client asks for."""

    id: str
    prompts: list[ReadyPrompt]
    params: GenerationParams
    served: Served
    timeline: Timeline

    def details(self, bytes_prefix: str) -> TokenDetails:
        """What the answer tells of each token."""
        params = self.params
        as_ids = bool(params.body.return_tokens_as_token_ids)
        return TokenDetails(
            names=TokenNames(self.served.tokenizer, as_ids, bytes_prefix),
            logprobs=params.logprobs,
            prompt_logprobs=params.body.prompt_logprobs,
            token_ids=params.return_token_ids,
        )
