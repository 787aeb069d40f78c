"""The arithmetic of the KV layout."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wire.layout import DTYPE_BYTES, KVLayout

small = st.integers(1, 9)
layouts = st.builds(KVLayout, small, small, small, small, st.sampled_from(sorted(DTYPE_BYTES)))


def test_sizes_of_a_known_model() -> None:
    layout = KVLayout(num_layers=12, num_kv_heads=4, head_dim=64, block_size=16, dtype="bfloat16")
    assert layout.bytes_per_token == 12 * 2 * 4 * 64 * 2 == 12288
    assert layout.block_bytes == 16 * 12288


@given(layouts, st.integers(0, 100))
def test_blocks_hold_the_tokens_and_no_block_is_wasted(layout: KVLayout, num_tokens: int) -> None:
    blocks = layout.num_blocks(num_tokens)
    assert blocks * layout.block_size >= num_tokens > (blocks - 1) * layout.block_size


@given(layouts)
def test_a_layout_says_all_that_distinguishes_it(layout: KVLayout) -> None:
    text = str(layout)
    for value in (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size):
        assert str(value) in text
    assert layout.dtype in text
