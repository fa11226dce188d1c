"""The books of the KV cache against plain lists."""

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.scheduler.block_pool import BlockPool

HASHES = [b"a", b"b", b"c", b"d"]


class PoolMachine(RuleBasedStateMachine):
    """A pool beside what it should hold: holders per block, and hashes of full blocks, free ones in order of age."""

    @initialize(num_blocks=st.integers(0, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[int] = []
        self.hashes: dict[int, bytes] = {}
        self.cached: list[int] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(0, self.pool.num_free))
        num_evicted = max(0, num_blocks - (self.pool.num_free - len(self.cached)))
        taken = self.pool.allocate(num_blocks)
        assert len(set(taken)) == num_blocks
        assert set(taken).isdisjoint(self.held)
        evicted, self.cached = self.cached[:num_evicted], self.cached[num_evicted:]
        assert set(evicted) <= set(taken), "the one free for longest goes first"
        assert set(self.cached).isdisjoint(taken), "no cached block goes while there are empty ones"
        for block_id in evicted:
            assert self.pool.find(self.hashes.pop(block_id)) is None
        self.held += taken

    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        if self.held:
            block_id, block_hash = data.draw(st.sampled_from(self.held)), data.draw(st.sampled_from(HASHES))
            self.pool.register(block_id, block_hash)
            if block_id not in self.hashes and block_hash not in self.hashes.values():
                self.hashes[block_id] = block_hash

    @rule(block_hashes=st.lists(st.sampled_from(HASHES), unique=True))
    def share(self, block_hashes: list[bytes]) -> None:
        found = [block_id for block_id, block_hash in self.hashes.items() if block_hash in block_hashes]
        assert self.pool.num_free_among(found) == sum(block_id not in self.held for block_id in found)
        self.pool.share(found)
        self.held += found
        self.cached = [block_id for block_id in self.cached if block_id not in found]

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        forgotten = data.draw(st.lists(st.sampled_from(self.held))) if self.held else []
        self.pool.forget(forgotten)
        for block_id in forgotten:
            self.hashes.pop(block_id, None)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        let_go = data.draw(st.lists(st.sampled_from(self.held), unique=True)) if self.held else []
        self.pool.free(let_go)
        for block_id in reversed(let_go):
            self.held.remove(block_id)
            if block_id not in self.held and block_id in self.hashes:
                self.cached.append(block_id)

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_books(self.held)
        assert self.pool.num_free == self.pool.num_total - len(set(self.held))
        assert self.pool.num_cached == len(self.cached)
        found = {block_hash: self.pool.find(block_hash) for block_hash in HASHES}
        assert {b: h for h, b in found.items() if b is not None} == self.hashes


TestPoolMachine: Any = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)


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


def test_holding_a_block_on_top_of_its_last_free_is_found_out() -> None:
    pool = BlockPool(2)
    [block_id] = pool.allocate(1)
    pool.register(block_id, b"a")
    pool.free([block_id])
    with pytest.raises(AssertionError, match="add up"):
        pool.check_books([block_id])
    pool.share([block_id])
    with pytest.raises(AssertionError, match="holder"):
        pool.check_books([block_id, block_id])
    pool.check_books([block_id])
