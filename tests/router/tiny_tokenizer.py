"""A byte-level tokenizer made on the fly: token id == byte value, then special tokens and words."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from router.token_bytes import _byte_of_character
from wire.fleet_messages import TokenizerFiles

EOS = 256
IM_START = 257
IM_END = 258
VOCAB_SIZE = 272  # padded beyond the tokenizer's, as real models are
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must come first') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_byte_of_character(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("</s>", "<|user|>", "<|assistant|>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("naïve token", special=False)])
    return tokenizer


def files() -> TokenizerFiles:
    config = {"eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    return TokenizerFiles(build().to_str().encode(), json.dumps(config).encode())
