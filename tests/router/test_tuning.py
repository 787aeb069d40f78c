"""The tuner in a router: what it sees of requests, what it asks of nodes, when it keeps still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from router.config import RouterConfig
from router.role_switch import State
from router.tuning import FleetTuner
from tests.router.harness import MODEL, Harness, endless, eventually, router
from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.observed import Standing
from tuner.online import Limits
from tuner.overheads import Overheads
from tuner.profile import Profile, save_profile
from wire.errors import ConfigError
from wire.fleet_messages import SwitchRole
from wire.layout import KVLayout
from wire.types import Role, StepSums

# Prompts of these nodes take so long that any of them presses.
MODEL_S = LatencyModel((0.8, 0.05, 0.0), (0.001, 0.0, 0.0), (0.001, 1e-9))
EAGER = Limits(hold_s=0, pause_s=0, min_requests=1)


def profile(fingerprint: str = MODEL.fingerprint) -> Profile:
    layout = KVLayout(2, 2, 16, 16, "float32")
    return Profile("stub", fingerprint, "made up", 512, layout, MODEL_S, {})


def tuner(
    harness: Harness,
    *,
    dry_run: bool = False,
    fingerprint: str = "",
    profiled: Profile | None = None,
) -> FleetTuner:
    made = FleetTuner(
        profiled or profile(fingerprint or MODEL.fingerprint),
        Slo(2.0, 0.1),
        harness.server.control,
        harness.server._metrics,
        harness.server._clock,
        dry_run=dry_run,
        limits=EAGER,
    )
    harness.server.control.requests.observed = made.observed
    return made


def with_pressed_fleet(act: Callable[[Harness], None]) -> None:
    """Two pairs of stub nodes that have served a few prompts; then `act`."""

    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.add_pair(endless)
            made = tuner(harness)
            for _ in range(4):
                assert (await harness.complete(max_tokens=3)).status == 200
            seen = made.observed.look(harness.server._clock(), Standing(2, 2))
            assert (seen.num_requests, seen.output_tokens) == (4, 3)
            assert 0 < seen.ttft_s < 60
            assert 0 < seen.tpot_s < 60
            act(harness)

    asyncio.run(scenario())


def used(harness: Harness, *, dry_run: bool = False) -> FleetTuner:
    """A tuner that has seen what the router's requests were."""
    seen = harness.server.control.requests.observed
    made = tuner(harness, dry_run=dry_run)
    assert seen is not None
    made.observed = seen
    made.look()
    return made


def test_it_asks_one_node_and_then_waits_for_it() -> None:
    def act(harness: Harness) -> None:
        made = used(harness)
        assert [(m.role, m.outcome) for m in made.moved] == [("prefill", "asked")]
        made.look()
        made.look()
        assert len(made.moved) == 1
        (switch,) = harness.server.control.switches.all()
        assert switch.node.name == made.moved[0].node
        told = made.as_json()
        assert told["mode"] == "on"
        assert "prefill needs a node" in told["moves"][0]["reason"]

    with_pressed_fleet(act)


def with_four_pairs(act: Callable[[Harness, FleetTuner], None]) -> None:
    """Whose requests press so hard that all decode nodes but the last are asked; then `act`."""

    async def scenario() -> None:
        async with router(endless) as harness:
            for _ in range(3):
                await harness.add_pair(endless)
            made, now = tuner(harness), harness.server._clock()
            for _ in range(50):
                made.observed.arrived(now, prompt_tokens=10)
                made.observed.ended(now, prompt_tokens=10, output_tokens=3)
            made.look()
            assert [(m.role, m.outcome) for m in made.moved] == [("prefill", "asked")] * 3
            act(harness, made)

    asyncio.run(scenario())


def test_it_asks_several_nodes_and_one_that_refuses_stops_no_other() -> None:
    def act(harness: Harness, _: FleetTuner) -> None:
        fleet, switches = harness.server.control.fleet, harness.server.control.switches
        assert fleet.num_serving(Role.DECODE) == 1, "each role keeps its last node"
        first, *others = switches.all()
        switches.refused(first.node, "not now", harness.server._clock())
        expected = [State.FAILED, State.DRAINING, State.DRAINING]
        assert [switch.state for switch in switches.all()] == expected
        assert fleet[first.node].serves
        assert not any(fleet[switch.node].serves for switch in others)

    with_four_pairs(act)


def test_a_node_that_failed_to_move_rests_while_others_are_asked() -> None:
    def act(harness: Harness, made: FleetTuner) -> None:
        first = {moved.node for moved in made.moved}
        switches = harness.server.control.switches
        for switch in switches.all():
            switches.refused(switch.node, "not now", harness.server._clock())
        made.look()
        again = [moved.node for moved in made.moved][len(first) :]
        assert again
        assert not first & set(again)

    with_four_pairs(act)


def test_it_counts_what_the_fleet_takes_besides_its_steps() -> None:
    """Of 2 s to the first token one is over before a node hears of the request."""
    slow = replace(profile(), overheads=Overheads(front_s=1.0, prefill_factor=1.1))

    def act(harness: Harness) -> None:
        plain, counting = used(harness, dry_run=True), tuner(harness, dry_run=True, profiled=slow)
        counting.observed = plain.observed
        counting.look()
        before, after = (made.as_json()["pressure"]["prefill"] for made in (plain, counting))
        assert after > 1.5 * before

    with_pressed_fleet(act)


def test_it_follows_the_nodes_own_pace() -> None:
    """The profile says 0.8 s for a step and 0.05 for a token; the nodes take twice that."""

    def act(harness: Harness) -> None:
        made = used(harness, dry_run=True)
        before = made.as_json()
        assert before["slower_than_profile"] == {"prefill": 1.0, "decode": 1.0}
        fleet, now = harness.server.control.fleet, harness.server._clock()
        node = next(node for node in fleet if node.info.role is Role.PREFILL)
        for steps in range(1, 20):
            sums = StepSums(steps, 10 * steps, 0, steps * 2 * 1.3)
            fleet.heartbeat(node.id, replace(node.load, prefill_steps=sums), now)
            made.look()
        told = made.as_json()
        assert told["slower_than_profile"] == {
            "prefill": pytest.approx(2.0, rel=0.02),
            "decode": 1.0,
        }
        assert told["pressure"]["prefill"] > before["pressure"]["prefill"]

    with_pressed_fleet(act)


def test_a_dry_run_asks_nobody() -> None:
    def act(harness: Harness) -> None:
        made = used(harness, dry_run=True)
        assert [m.outcome for m in made.moved] == ["dry-run"]
        assert harness.server.control.switches.all() == []
        assert harness.sent(SwitchRole) == []

    with_pressed_fleet(act)


def test_a_profile_of_another_model_tunes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def act(harness: Harness) -> None:
        made = tuner(harness, fingerprint="other")
        made.look()
        made.look()
        assert not made.moved
        assert caplog.text.count("the tuner does nothing") == 1

    with_pressed_fleet(act)


def test_a_router_started_with_it_shows_and_counts_it(tmp_path: Path) -> None:
    save_profile(profile(), tmp_path / "profile.json")

    async def scenario() -> None:
        options = {"tune": "dry-run", "slo_ttft_ms": 2000.0, "slo_tpot_ms": 100.0}
        path = tmp_path / "profile.json"
        async with router(endless, tune_profile=path, **options) as harness:
            await harness.complete(max_tokens=2)
            tuner = harness.server._tuner
            assert tuner is not None
            await eventually(lambda: tuner.as_json()["decision"] != "")
            told = (await harness.get("/debug/fleet")).json["tuner"]
            assert told["mode"] == "dry-run"
            assert told["observed"]["num_requests"] == 1
            metrics = (await harness.get("/metrics")).body.decode()
            assert 'baton_router_tuner_decisions_total{decision="stay"}' in metrics

    asyncio.run(scenario())


@pytest.mark.parametrize("missing", ["tune_profile", "slo_ttft_ms", "slo_tpot_ms"])
def test_what_it_needs_is_asked_for(missing: str) -> None:
    given = {"tune_profile": Path("p.json"), "slo_ttft_ms": 1.0, "slo_tpot_ms": 1.0}
    del given[missing]
    with pytest.raises(ConfigError, match="--tune needs"):
        RouterConfig(tune="on", **given)  # type: ignore[arg-type]
