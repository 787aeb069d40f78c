"""`--speculative-config`: what is understood, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.drafting.config import NO_SPECULATION, SpeculativeConfig, parse_speculative_config
from wire.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", NO_SPECULATION),
        ('{"method": "none"}', NO_SPECULATION),
        ('{"method": "ngram"}', SpeculativeConfig("ngram")),
        (
            '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 3}',
            SpeculativeConfig(
                "ngram", num_speculative_tokens=8, prompt_lookup_min=3, prompt_lookup_max=3
            ),
        ),
        ('{"model": "./draft"}', SpeculativeConfig("draft_model", Path("./draft"))),
        ('{"method": "eagle3", "model": "h"}', SpeculativeConfig("eagle3", Path("h"))),
        ('{"method": "deepseek_mtp"}', SpeculativeConfig("mtp")),
    ],
)
def test_what_is_understood(text: str, config: SpeculativeConfig) -> None:
    assert parse_speculative_config(text) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ngram", "not JSON"),
        ('["ngram"]', "JSON object"),
        ("{}", "method is missing"),
        ('{"method": "medusa"}', "one of none, ngram, draft_model"),
        ('{"method": "ngram", "quantization": "fp8"}', "unknown: quantization"),
        ('{"method": "ngram", "num_speculative_tokens": "5"}', "num_speculative_tokens must be a"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "num_speculative_tokens must be a"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "between 1 and 32"),
        ('{"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}', "in order"),
        ('{"method": "ngram", "model": "x"}', "model does not go with the method ngram"),
        ('{"method": "draft_model"}', "draft_model needs model"),
        ('{"method": "eagle"}', "eagle needs model"),
    ],
)
def test_mistakes_are_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speculative_config(text)
    assert told in str(caught.value)
    assert "--speculative-config" in str(caught.value)
    assert "\n" not in str(caught.value)
