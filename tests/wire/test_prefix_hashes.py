"""Equal hashes mean equal prefixes, of one model and one tenant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wire.prefix import HASH_BYTES, block_hashes, child_hash, root_hash

tokens = st.lists(st.integers(0, (1 << 31) - 1), max_size=40)
sizes = st.integers(1, 8)
ROOT = root_hash("model")


@given(tokens, sizes)
def test_one_hash_per_full_block(prompt: list[int], size: int) -> None:
    hashes = block_hashes(prompt, size, ROOT)
    assert len(hashes) == len(prompt) // size
    assert all(len(value) == HASH_BYTES for value in hashes)
    assert len(set(hashes)) == len(hashes)  # the place is part of the name


@given(tokens, tokens, sizes)
def test_hashes_agree_exactly_as_far_as_the_prefixes_do(
    first: list[int], second: list[int], size: int
) -> None:
    pairs = zip(block_hashes(first, size, ROOT), block_hashes(second, size, ROOT), strict=False)
    for index, (one, other) in enumerate(pairs):
        end = (index + 1) * size
        assert (one == other) == (first[:end] == second[:end])


@given(tokens, sizes, st.data())
def test_a_prefix_of_the_tokens_has_a_prefix_of_the_hashes(
    prompt: list[int], size: int, draw: st.DataObject
) -> None:
    end = draw.draw(st.integers(0, len(prompt)))
    shorter = block_hashes(prompt[:end], size, ROOT)
    assert shorter == block_hashes(prompt, size, ROOT)[: len(shorter)]


def test_model_and_salt_keep_prefixes_apart() -> None:
    roots = [root_hash("model"), root_hash("model", "salt"), root_hash("modelsalt"), root_hash("")]
    chains = [tuple(block_hashes([1, 2, 3, 4], 2, root)) for root in roots]
    assert len({value for chain in chains for value in chain}) == 8


def test_the_names_do_not_change_between_versions() -> None:
    """Nodes of two versions may serve one fleet during an upgrade."""
    root = root_hash("model", "salt")
    assert child_hash(root, [1, 2, 3]).hex() == "3611cd9c624f4ed5c2c7327f83736e84"


def test_a_chain_is_its_links() -> None:
    first = child_hash(ROOT, (1, 2))
    assert block_hashes((1, 2, 3, 4, 5), 2, ROOT) == [first, child_hash(first, [3, 4])]
