"""From a body's bytes to a validated model, and from a failed validation to one clear error."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from router.errors import ApiError, bad_request, shorten

Model = TypeVar("Model", bound=BaseModel)


def json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request("The body is not valid UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {shorten(str(error), 200)}") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    _refuse_surrogates(data, value)
    return value


def _refuse_surrogates(data: bytes, value: dict[str, Any]) -> None:
    """JSON can spell half a UTF-16 pair, which is no character and has no tokens."""
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise bad_request("The body contains half of a surrogate pair.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def without_neutral(
    fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """`fields` without known unsupported ones that ask for nothing; raises for those that ask."""
    for name in fields.keys() & neutral.keys():
        if not _asks_nothing(fields[name], neutral[name]):
            raise not_supported(where + name)
    return {name: value for name, value in fields.items() if name not in neutral}


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def not_supported(name: str) -> ApiError:
    return bad_request(f"`{name}` is not supported yet.", param=name, code="unsupported_parameter")


def validate(kind: type[Model], fields: dict[str, Any], where: str = "") -> Model:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error, where) from None


def _explain(error: ValidationError, where: str) -> ApiError:
    """The most telling of pydantic's errors, without the client's input."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    first = max(errors, key=lambda item: len(item["loc"])) if len(errors) > 1 else errors[0]
    param = where + ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    if first["type"] == "extra_forbidden":
        return bad_request(
            f"Unrecognized request argument supplied: {shorten(param, 100)}",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: `{param}`.", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    return bad_request(f"Invalid value for `{shorten(param, 100)}`: {reason}.", param=param)


def _is_union_branch(part: str | int) -> bool:
    """Pydantic puts the tried alternative of a union into the path, e.g. `list[str]`."""
    return isinstance(part, str) and ("[" in part or "-" in part or part in ("str", "TextPart"))
