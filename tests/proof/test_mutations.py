"""The explorer sees: every safeguard that is removed leads to a counterexample within the bound."""

from __future__ import annotations

import pytest

from tests.proof.explore import CounterexampleError, Explorer
from tests.proof.mutations import MUTATIONS, Mutation
from tests.proof.world import SCENARIOS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_missing_safeguard_is_noticed(mutation: Mutation) -> None:
    scenario = next(s for s in SCENARIOS if s.name == mutation.scenario)
    with mutation.applied(), pytest.raises(CounterexampleError) as found:
        Explorer(scenario).run(max_states=150_000)
    print(found.value)
