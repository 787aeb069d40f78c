"""Whether a running fleet is one whose overheads can be measured.

The probes tell what one prefill node takes, what one decode node takes, and what lies between them:
of two nodes of a kind they would see half, and of prompts that are computed where they are answered
neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import aiohttp

from tuner.client import reason
from wire.errors import ConfigError

_WANTED = "baton serve MODEL --prefill 1 --decode 1 --handoff always"


async def check_fleet(session: aiohttp.ClientSession, url: str) -> None:
    """Raise ConfigError unless the fleet behind `url` hands over every request it is asked for."""
    try:
        async with session.get(f"{url}/debug/fleet") as answer:
            told = await answer.json(content_type=None) if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(f"cannot reach {url}: {reason(error)}") from error
    except ValueError:
        told = None
    obstacle = obstacle_of(told) if isinstance(told, Mapping) else "it has no /debug/fleet"
    if obstacle is not None:
        raise ConfigError(f"cannot measure {url}: {obstacle}; serve it by `{_WANTED}`, unused")


def obstacle_of(told: Mapping[str, Any]) -> str | None:
    """Why probes would measure something else than a step here and a handoff there."""
    try:
        mode = told["handoff"]["mode"]
        roles = Counter(str(node["role"]) for node in told["nodes"] if node["state"] == "serving")
        busy = int(told["running"]) + int(told["waiting"])
    except (KeyError, TypeError):
        return "its /debug/fleet is not that of a Baton router"
    if mode != "always":
        return f"with --handoff {mode} prompts may be computed where they are answered"
    if roles != {"prefill": 1, "decode": 1}:
        found = ", ".join(f"{count} {role}" for role, count in sorted(roles.items())) or "none"
        return f"it must be one prefill and one decode node, it has {found}"
    return f"it is not idle, {busy} requests are being served" if busy else None
