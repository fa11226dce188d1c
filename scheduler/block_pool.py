"""The books of the paged KV cache: which fixed-size blocks are free and which are held.

Owned by the engine thread. Knows block numbers only, neither tensors nor sequences.
Paper: PagedAttention (Kwon et al., SOSP 2023). Deviation: no copy-on-write, no swapping to host memory.
"""


class BlockPool:
    """Allocates and frees blocks. Freed blocks are reused last-in first-out, which keeps the touched memory small."""

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks. The caller has made sure that so many are free, and frees them."""
        assert num_blocks <= len(self._free), "allocate() beyond num_free"
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block_id in block_ids:
            self._is_free[block_id] = 0
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back."""
        for block_id in reversed(block_ids):
            assert not self._is_free[block_id], f"block {block_id} freed twice"
            self._is_free[block_id] = 1
            self._free.append(block_id)
