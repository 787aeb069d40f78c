"""`baton profile --fleet` asks real nodes, and leaves them as it found them."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import pytest

from baton import profile
from baton.profile_load import under_load
from tests.e2e.conftest import MakeFleet
from tuner.latency import LatencyModel
from tuner.probe import check
from tuner.profile import Profile, load_profile
from wire.errors import ConfigError
from wire.layout import KVLayout

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
PHASES = ("alone", "wait for each other", "decode together", "while streams", "come and go")


def test_a_running_fleet_is_measured(
    make_fleet: MakeFleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profile, "LOAD_S", 2.0)
    fleet, path = make_fleet().start(), tmp_path / "profile.json"
    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    limits = ["--seconds", "1", "--max-model-len", "1024"]
    args = parser.parse_args(
        [str(fleet.model), "-o", str(path), *limits, "--fleet", f"{fleet.url}/v1"]
    )
    assert profile.run(args) == 0
    told = capsys.readouterr().out
    assert all(phase in told for phase in PHASES)
    found = load_profile(path)
    over = found.overheads
    assert over.applied(found.latency) != found.latency
    assert over.decode_factor != 1.0, "by requests that came and went"
    asyncio.run(check(fleet.url, found.model_name))  # idle: it could be measured again
    fleet.assert_balanced()


def test_a_request_that_fails_ends_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(flags=("--max-model-len", "64"))
    steps = LatencyModel((0.02, 1e-3, 3e-7), (0.02, 2e-6, 1e-3), (0.001, 1e-10))
    longer = Profile("", "", "", 2048, KVLayout(2, 2, 16, 16, "float32"), steps, {})
    with pytest.raises(ConfigError, match="a request of coming and going failed"):
        under_load(longer, fleet.url, chunk=512, seconds=1.0, seed=1)
    fleet.assert_balanced()
