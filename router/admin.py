"""`/admin/role`: another role for a node, for whoever runs the fleet.

The route exists where the debug pages do. A body must say that it is JSON, which no page of another
origin can make a browser send without asking first.
"""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from pydantic import Field

from router.api_structured import Strict
from router.control import Control
from router.errors import ApiError
from router.fleet_json import switch_json
from router.parsing import json_object, validate
from router.role_switch import DRAIN_S, MAX_DRAIN_S, SwitchImpossible
from router.serving import Serving
from wire.types import Role


class RoleBody(Strict):
    """POST /admin/role."""

    node: Annotated[str, Field(min_length=1, max_length=256)]
    role: Annotated[Role, Field(strict=False)]
    drain_s: Annotated[float, Field(ge=0, le=MAX_DRAIN_S)] = DRAIN_S


class AdminPages:
    """Orders to the fleet."""

    def __init__(self, serving: Serving, control: Control) -> None:
        self._serving = serving
        self._control = control

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/admin/role", self.role)]

    async def role(self, request: web.Request) -> web.Response:
        """Begin to switch; `/debug/fleet` tells how it goes on."""
        if request.content_type != "application/json":
            raise ApiError(415, "The body must be sent with `Content-Type: application/json`.")
        body = validate(RoleBody, json_object(await self._serving.read(request)))
        now = self._control.now
        try:
            switch = self._control.switches.begin(body.node, body.role, now, body.drain_s)
        except SwitchImpossible as error:
            status, code = (404, "unknown_node") if error.unknown else (409, "role_switch_refused")
            raise ApiError(status, f"{error}.", code=code) from error
        return web.json_response(switch_json(switch, now), status=202)
