"""`/debug/fleet`: the nodes as this router sees them, for whoever runs it.

Of several workers each answers for itself.
"""

from __future__ import annotations

from aiohttp import web

from router.control import Control
from router.fleet_json import fleet_json
from router.judge import Judge


class FleetPage:
    """The route exists where the debug pages do."""

    def __init__(self, control: Control, judge: Judge) -> None:
        self._control = control
        self._judge = judge

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/debug/fleet", self.fleet)]

    async def fleet(self, request: web.Request) -> web.Response:
        control = self._control
        waiting = control.requests.num_waiting
        running = len(control.requests) - waiting
        switches, tuner = control.switches.all(), control.describe_tuner()
        body = fleet_json(
            control.fleet, self._judge, switches, running, waiting, control.now, tuner
        )
        return web.json_response(body)
