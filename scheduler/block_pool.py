"""The books of the paged KV cache: which fixed-size blocks are empty, held, or free and still of use as a prefix.

Owned by the engine thread. Knows block numbers and content hashes only, neither tensors nor sequences. A full block
whose hash is registered can be shared; once nobody holds it, it stays findable until its place is needed, the least
recently freed first.
Papers: PagedAttention (Kwon et al., SOSP 2023), without copy-on-write, since only full blocks are shared, and without
swapping to host memory; the prefix tree of SGLang (Zheng et al., 2024) as a table of chained hashes, as in vLLM.
"""

from collections import Counter, OrderedDict


class BlockPool:
    """Allocates, shares and frees blocks. Empty ones are reused last-in first-out, which keeps touched memory small."""

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, hash registered, next to go first
        self._num_holders = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_ids: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found by their hash."""
        return len(self._cached)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks. The caller has made sure that so many are free, and frees them."""
        assert num_blocks <= self.num_free, "allocate() beyond num_free"
        block_ids = [self._empty.pop() if self._empty else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, held or free; it stays one's own only after `share`."""
        return self._block_ids.get(block_hash)

    def num_free_among(self, block_ids: list[int]) -> int:
        """How many of these found blocks nobody holds: sharing them leaves so many fewer to allocate."""
        return sum(self._num_holders[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: list[int]) -> None:
        """Hold found blocks beside their other holders. The caller frees them."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                del self._cached[block_id]
            self._num_holders[block_id] += 1

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Make a held block findable, now that it is full and computed. Of two with one content the first stays so."""
        assert self._num_holders[block_id] > 0, f"block {block_id} registered and not held"
        if self._hashes[block_id] is None and block_hash not in self._block_ids:
            self._hashes[block_id] = block_hash
            self._block_ids[block_hash] = block_id

    def forget(self, block_ids: list[int]) -> None:
        """Let nobody find these held blocks any more; who shares them keeps them."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} forgotten and not held"
            block_hash, self._hashes[block_id] = self._hashes[block_id], None
            if block_hash is not None:
                del self._block_ids[block_hash]

    def free(self, block_ids: list[int]) -> None:
        """Let go of blocks. A sequence's last block is evicted first: without it the others still serve."""
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} freed twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                if self._hashes[block_id] is None:
                    self._empty.append(block_id)
                else:
                    self._cached[block_id] = None

    def check_books(self, held: list[int]) -> None:
        """Assert that what is not free is held, each block as often as it occurs in `held`."""
        num_holders = Counter(held)
        assert self.num_free + len(num_holders) == self.num_total, "blocks do not add up"
        assert all(self._num_holders[block_id] == num for block_id, num in num_holders.items()), "a holder is unknown"
        assert len(self._block_ids) >= self.num_cached, "a cached block cannot be found"

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        block_hash, self._hashes[block_id] = self._hashes[block_id], None
        assert block_hash is not None
        del self._block_ids[block_hash]
        return block_id
