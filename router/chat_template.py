"""Chat templates: Jinja in a sandbox, with the helpers that model folders expect to find."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.api import ChatMessage
from router.errors import bad_request
from wire.errors import ConfigError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate:
    """Renders messages to the prompt that one model was trained on."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        self._special_tokens = special_tokens
        self._knows_developer = "developer" in source

    def render(self, messages: list[ChatMessage]) -> str:
        """The prompt, up to where the assistant begins. Raises ApiError."""
        try:
            return self._template.render(
                messages=[self._as_dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise bad_request(
                f"The model's chat template refuses these messages: {error}", "messages"
            ) from error

    def _as_dict(self, message: ChatMessage) -> dict[str, Any]:
        """Text parts are joined by newlines; `developer` is `system` to older templates."""
        role: str = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        named = {} if message.name is None else {"name": message.name}
        return {"role": role, "content": text, **named}


def template_source(config: dict[str, Any], template_file: bytes) -> str | None:
    """The template: the file of its own wins over the entry in the tokenizer's config."""
    if template_file:
        return template_file.decode("utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by their role; some folders wrap them in an object."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike Jinja's own filter this one does not escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
