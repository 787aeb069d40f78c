"""Chat templates: Jinja in a sandbox, with the helpers that model folders expect to find."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.api_chat import ChatMessage, ChatRendering
from router.api_tools import MadeCall
from router.errors import bad_request
from router.tools.use import preamble
from wire.errors import ConfigError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a request wants its conversation rendered."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template: str | None = None  # instead of the model's
    kwargs: dict[str, Any] = field(default_factory=dict)  # variables for the template
    tools: tuple[dict[str, Any], ...] = ()


PLAIN = ChatOptions()


def chat_options(body: ChatRendering) -> ChatOptions:
    """What a request says of it; null stands for the default."""
    return ChatOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        template=body.chat_template,
        kwargs=body.chat_template_kwargs or {},
    )


class ChatTemplate:
    """Renders messages to the prompt that one model was trained on."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        self.special_tokens = special_tokens
        self.source = source
        self._knows_developer = "developer" in source
        self._knows_tools = "tools" in source

    def render(self, messages: list[ChatMessage], options: ChatOptions = PLAIN) -> str:
        """The prompt, up to where the assistant begins or goes on. Raises ApiError."""
        final = messages[-1] if options.continue_final_message else None
        turns = [self._as_dict(message) for message in messages]
        if options.tools and not self._knows_tools:
            turns = _with_preamble(turns, preamble(options.tools))
        try:
            text = self._template.render(
                {
                    "tools": None,
                    "documents": None,
                    **self.special_tokens,
                    **options.kwargs,
                    "messages": turns,
                    "add_generation_prompt": options.add_generation_prompt,
                    **({"tools": list(options.tools)} if options.tools else {}),
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise bad_request(
                f"The model's chat template refuses these messages: {error}", "messages"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise bad_request("The chat template takes too much.", "messages") from error
        return text if final is None else _up_to_the_end_of(turns[-1]["content"], text)

    def _as_dict(self, message: ChatMessage) -> dict[str, Any]:
        """Text parts are joined by newlines; `developer` is `system` to older templates."""
        role: str = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        content = message.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        turn: dict[str, Any] = {"role": role, "content": text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                turn[name] = value
        if not message.tool_calls:
            return turn
        if not self._knows_tools:
            return {
                **turn,
                "content": "\n".join(filter(None, [text, *map(_told, message.tool_calls)])),
            }
        return {**turn, "tool_calls": [_made_call(call) for call in message.tool_calls]}


def _with_preamble(turns: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The tools in a system message, which some templates only allow as the first."""
    if turns[0]["role"] in ("system", "developer"):
        first = {**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}
        return [first, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _made_call(call: MadeCall) -> dict[str, Any]:
    """As templates expect it: the arguments as an object, if they are one."""
    return {"id": call.id, "type": "function", "function": _function(call)}


def _function(call: MadeCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"name": call.function.name, "arguments": arguments}


def _told(call: MadeCall) -> str:
    """A call as the preamble asks for it."""
    return f"<tool_call>\n{json.dumps(_function(call), ensure_ascii=False)}\n</tool_call>"


def _up_to_the_end_of(content: str, text: str) -> str:
    """The prompt, cut where the last message ends, so that the model goes on within it."""
    shown = content if content in text else content.strip()
    if not shown or shown not in text:
        raise bad_request(
            "The chat template does not show the last message as it is, so it cannot be continued.",
            "continue_final_message",
        )
    return text[: text.rindex(shown) + len(shown)]


def requested_template(source: str, of_model: ChatTemplate | None) -> ChatTemplate:
    """A template that came with the request. Raises ApiError."""
    try:
        return ChatTemplate(source, of_model.special_tokens if of_model else {})
    except ConfigError as error:
        raise bad_request(f"Invalid value for `chat_template`: {error}", "chat_template") from error


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
