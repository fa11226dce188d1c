"""The books of the KV cache against a set of numbers."""

import pytest
from hypothesis import given, settings, strategies as st

from headrace.scheduler.block_pool import BlockPool


@settings(max_examples=100, derandomize=True, deadline=None)
@given(num_blocks=st.integers(0, 12), data=st.data())
def test_a_block_is_either_free_or_held_by_one_whatever_is_allocated_and_freed(
    num_blocks: int, data: st.DataObject
) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []
    for _ in range(data.draw(st.integers(0, 20))):
        if data.draw(st.booleans()):
            taken = pool.allocate(data.draw(st.integers(0, pool.num_free)))
            assert set(taken).isdisjoint(held)
            held += taken
        else:
            given_back = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
            pool.free(given_back)
            held = [block_id for block_id in held if block_id not in given_back]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert pool.num_free == num_blocks - len(held)
        assert pool.num_total == num_blocks
    assert sorted(held + pool.allocate(pool.num_free)) == list(range(num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_blocks_freed_last_are_used_first(num_blocks: int) -> None:
    pool = BlockPool(8)
    pool.allocate(2)
    taken = pool.allocate(num_blocks)
    pool.allocate(1)
    pool.free(taken)
    assert pool.allocate(num_blocks) == taken


def test_taking_more_than_is_free_or_freeing_twice_is_a_bug() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.allocate(3)
    taken = pool.allocate(1)
    pool.free(taken)
    with pytest.raises(AssertionError):
        pool.free(taken)
    with pytest.raises(AssertionError):
        pool.free([1, 1])
