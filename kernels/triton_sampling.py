"""Drawing tokens on the GPU without sorting the vocabulary.

The vocabulary is cut into chunks of a fixed size, so that a row's sums, hence its token, are the same in every batch.
One pass finds each chunk's maximum and sum; where top-k or top-p cuts, a second adds up what lies above a few pivots, a
third keeps the logits between the two pivots around the cut, and one program per row bisects those and draws.
FlashInfer (Ye et al., MLSys 2025) has no sort either but rejects draws; here one uniform number decides the token by
the inverse of the cumulative distribution. Logits that are NaN count as -inf where tokens are drawn, and a row of
nothing else gives token 0: `argmax`, of the logits as the model left them, is what tells such rows.
"""

import torch
import triton
import triton.language as tl

# Logits per program. A row's sums are made of chunks, so this must not depend on the number of rows.
_CHUNK = 4096
_NUM_PIVOTS = 8
# Logits between the pivots that a row's program looks at in one go, those of all chunks together.
_LIST_TILE = 4096

_LOG2_E = tl.constexpr(1.4426950408889634)
# The largest number that is both a float32 and a bfloat16: +inf minus +inf is not zero, this is.
_LARGEST = tl.constexpr(3.3895313892515355e38)
# Tokens that together weigh less than this share of a row are out of top-k's reach.
_NEGLIGIBLE = tl.constexpr(2.0**-24)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest of each row, the lowest of equal ones, -1 where one is NaN or +inf. logits [R, V] ->
    int32 [R]."""
    chunks = _Chunks(logits)
    token_ids = torch.empty(chunks.num_rows, dtype=torch.int32, device=logits.device)
    if chunks.num_rows:
        chunk_max, _, _ = chunks.reduce(temperature=None, has_sum=False)
        _pick_largest[(chunks.num_rows,)](
            logits,
            chunk_max,
            token_ids,
            chunks.row_stride,
            chunks.vocab_size,
            CHUNK=_CHUNK,
            C=chunks.width,
            num_warps=8,
        )
    return token_ids


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    has_filters: bool = True,
    is_all_greedy: bool = False,
) -> torch.Tensor:
    """Draw a token per row. logits [R, V], settings [R], float32 but for top_k int32 -> int32 [R].

    Temperature 0 takes the largest; top_k 0, top_p 1 and min_p 0 are off. The kept tokens are the first by (probability
    descending, index ascending); drawn is the first of them, in the order of the vocabulary, whose cumulative share of
    what is kept exceeds `uniform`, in [0, 1). `has_filters` False and `is_all_greedy` True promise that no row filters
    and that every temperature is 0: fewer launches.
    """
    if is_all_greedy:
        return argmax(logits)
    chunks = _Chunks(logits)
    device, num_rows, num_chunks = logits.device, chunks.num_rows, chunks.num_chunks
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    if not num_rows:
        return token_ids
    chunk_max, chunk_sum, chunk_min = chunks.reduce(temperature, has_sum=True)
    # Without filters none of these is read.
    state = num_listed = num_above = token_ids
    cut = mass_above = kept_above = chunk_max
    listed = logits
    if has_filters:
        state = torch.empty(num_rows, dtype=torch.int32, device=device)
        pivots, cut = torch.empty((2, num_rows, _NUM_PIVOTS), device=device)
        masses = torch.empty((num_rows, chunks.width, _NUM_PIVOTS), device=device)
        counts = torch.empty((num_rows, chunks.width, _NUM_PIVOTS), dtype=torch.int32, device=device)
        _sum_above_pivots[(num_chunks, num_rows)](
            logits,
            temperature,
            top_k,
            top_p,
            chunk_max,
            chunk_sum,
            chunk_min,
            state,
            pivots,
            counts,
            masses,
            chunks.row_stride,
            chunks.vocab_size,
            CHUNK=_CHUNK,
            C=chunks.width,
            NUM_PIVOTS=_NUM_PIVOTS,
            num_warps=4,
        )
        listed = torch.empty((num_rows, num_chunks * _CHUNK), dtype=logits.dtype, device=device)
        num_listed, num_above = torch.empty((2, num_rows, chunks.width), dtype=torch.int32, device=device)
        mass_above, kept_above = torch.empty((2, num_rows, chunks.width), device=device)
        _list_between_pivots[(num_chunks, num_rows)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            chunk_max,
            chunk_sum,
            state,
            pivots,
            counts,
            masses,
            cut,
            listed,
            num_listed,
            num_above,
            mass_above,
            kept_above,
            chunks.row_stride,
            chunks.vocab_size,
            CHUNK=_CHUNK,
            C=chunks.width,
            NUM_PIVOTS=_NUM_PIVOTS,
            num_warps=4,
        )
    _draw[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        chunk_max,
        chunk_sum,
        state,
        cut,
        listed,
        num_listed,
        num_above,
        mass_above,
        kept_above,
        token_ids,
        chunks.row_stride,
        chunks.vocab_size,
        int(has_filters),
        CHUNK=_CHUNK,
        C=chunks.width,
        NUM_PIVOTS=_NUM_PIVOTS,
        WIDTH=max(1, _LIST_TILE // chunks.width),
        SHIFT=16 if logits.dtype == torch.bfloat16 else 0,
        num_warps=8,
    )
    return token_ids


class _Chunks:
    """Rows of logits, [R, V], cut into chunks; `width` is the power of two that tables of chunks are wide."""

    def __init__(self, logits: torch.Tensor) -> None:
        assert logits.stride(1) == 1, "rows whose numbers are not side by side"
        self._logits = logits
        self.num_rows, self.vocab_size = logits.shape
        self.row_stride = logits.stride(0)
        self.num_chunks = triton.cdiv(self.vocab_size, _CHUNK)
        # At least four, so that every table begins at a multiple of 16 bytes.
        self.width = max(4, triton.next_power_of_2(self.num_chunks))

    def reduce(
        self, temperature: torch.Tensor | None, has_sum: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each chunk's maximum, sum of exp((logit - maximum) / temperature) and least finite logit: float32 [R, C].
        Without sums the maximum is +inf where a logit is NaN or that."""
        tables = torch.empty((3, self.num_rows, self.width), device=self._logits.device)
        _reduce_chunks[(self.num_chunks, self.num_rows)](
            self._logits,
            temperature,
            tables[0],
            tables[1],
            tables[2],
            self.row_stride,
            self.vocab_size,
            CHUNK=_CHUNK,
            C=self.width,
            HAS_SUM=has_sum,
            HAS_TEMPERATURE=temperature is not None,
            num_warps=4,
        )
        return tables[0], tables[1], tables[2]


@triton.jit
def _load_raw_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + index, mask=index < vocab_size, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A chunk in float32 without NaN and +inf; beyond the vocabulary is -inf. -> float32 [CHUNK]."""
    x = _load_raw_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
    return tl.minimum(tl.where(x == x, x, float("-inf")), _LARGEST)


@triton.jit
def _exponent_scale(temperature):  # type: ignore[no-untyped-def]
    """What turns a difference of logits into an exponent of 2; bounded, as 0 * inf is not a number."""
    temperature = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.maximum(_LOG2_E / tl.maximum(temperature, 1e-30), 1e-30), 1e30)


@triton.jit
def _load_row(chunk_max, chunk_sum, row, scale, vocab_size, CHUNK: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each chunk's maximum and mass, the latter relative to the row's maximum, which is 0 where all is -inf."""
    chunks = tl.arange(0, C)
    mask = chunks < tl.cdiv(vocab_size, CHUNK)
    maxima = tl.load(chunk_max + row * C + chunks, mask=mask, other=float("-inf"))
    sums = tl.load(chunk_sum + row * C + chunks, mask=mask, other=0.0)
    largest = tl.max(maxima, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return maxima, sums * tl.exp2((maxima - largest) * scale), largest


@triton.jit
def _reduce_chunks(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    chunk_max,
    chunk_sum,
    chunk_min,
    row_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1)
    if HAS_SUM:
        x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
    else:
        x = _load_raw_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
        x = tl.where(x < float("inf"), x, float("inf"))
    largest = tl.max(x, axis=0)
    tl.store(chunk_max + row * C + chunk, largest)
    if HAS_SUM:
        if HAS_TEMPERATURE:
            scale = _exponent_scale(tl.load(temperature + row))
            least = tl.min(tl.where(x == float("-inf"), float("inf"), x), axis=0)
            tl.store(chunk_min + row * C + chunk, least)
        else:
            scale = _exponent_scale(1.0)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(chunk_sum + row * C + chunk, tl.sum(tl.exp2((x - largest) * scale), axis=0))


@triton.jit
def _pick_largest(logits, chunk_max, token_ids, row_stride, vocab_size, CHUNK: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    chunks = tl.arange(0, C)
    mask = chunks < tl.cdiv(vocab_size, CHUNK)
    maxima = tl.load(chunk_max + row * C + chunks, mask=mask, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    chunk = tl.min(tl.where(maxima == largest, chunks, C), axis=0)
    x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
    token_id = chunk * CHUNK + tl.min(tl.where(x == largest, tl.arange(0, CHUNK), CHUNK), axis=0)
    tl.store(token_ids + row, tl.where(largest < float("inf"), token_id, -1))


@triton.jit
def _sum_above_pivots(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    chunk_max,
    chunk_sum,
    chunk_min,
    state,
    pivots,
    counts,
    masses,
    row_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Count and weigh a chunk's tokens above each of a row's pivots, descending: int32 and float32 [R, C, NUM_PIVOTS].

    `state` int32 [R] says what is to be done for a row: 0 no cut is sought, 1 one is, 2 the first token alone is kept.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    t, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    has_top_k = (k > 0) & (k < vocab_size)
    has_top_p = p < 1.0
    status = ((t > 0) & (has_top_k | has_top_p)).to(tl.int32)
    if status == 1:
        scale = _exponent_scale(t)
        _, chunk_masses, largest = _load_row(chunk_max, chunk_sum, row, scale, vocab_size, CHUNK, C)
        total = tl.sum(chunk_masses, axis=0)
        # The largest weighs 1, and top-k lets top-p have no more than `total`.
        status = tl.where((k == 1) | (has_top_p & (p * total <= 1.0)), 2, 1)
        if status == 1:
            # All that weighs less than `lightest` has less than the share of the mass that may be cut off.
            share = tl.where(has_top_k, _NEGLIGIBLE, 0.25 * (1.0 - p))
            lightest = share * total / vocab_size
            chunks = tl.arange(0, C)
            mask = chunks < tl.cdiv(vocab_size, CHUNK)
            least = tl.min(tl.load(chunk_min + row * C + chunks, mask=mask, other=float("inf")), axis=0)
            lowest = tl.minimum(tl.maximum(largest + tl.log2(lightest) / scale, least), largest)
            step = tl.minimum(largest - lowest, 1e38) / NUM_PIVOTS
            out = (row * C + chunk) * NUM_PIVOTS
            if tl.load(chunk_max + row * C + chunk) >= lowest:
                x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
                weight = tl.exp2((x - largest) * scale)
                if has_top_k:
                    for i in tl.static_range(NUM_PIVOTS):
                        is_above = x >= lowest + step * (NUM_PIVOTS - 1 - i)
                        tl.store(counts + out + i, tl.sum(is_above.to(tl.int32), axis=0))
                if has_top_p:
                    for i in tl.static_range(NUM_PIVOTS):
                        is_above = x >= lowest + step * (NUM_PIVOTS - 1 - i)
                        tl.store(masses + out + i, tl.sum(tl.where(is_above, weight, 0.0), axis=0))
            else:
                i = tl.arange(0, NUM_PIVOTS)
                tl.store(counts + out + i, tl.zeros((NUM_PIVOTS,), tl.int32))
                tl.store(masses + out + i, tl.zeros((NUM_PIVOTS,), tl.float32))
            for i in tl.static_range(NUM_PIVOTS):
                tl.store(pivots + row * NUM_PIVOTS + i, lowest + step * (NUM_PIVOTS - 1 - i), mask=chunk == 0)
    tl.store(state + row, status, mask=chunk == 0)


@triton.jit
def _list_between_pivots(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    chunk_max,
    chunk_sum,
    state,
    pivots,
    counts,
    masses,
    cut,
    listed,
    num_listed,
    num_above,
    mass_above,
    kept_above,
    row_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """List a chunk's logits between the pivots around the row's cut, in order, and add up those above.

    `cut` [R, NUM_PIVOTS] gets the two pivots, `listed` [R, chunks, CHUNK] and `num_listed` [R, C] the logits, the
    tables [R, C] the number and mass above the upper pivot, and what min-p keeps of that mass.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    status = tl.load(state + row)
    t, m = tl.load(temperature + row), tl.load(min_p + row)
    if (status == 1) | ((status == 0) & (t > 0) & (m > 0)):
        scale = _exponent_scale(t)
        _, chunk_masses, largest = _load_row(chunk_max, chunk_sum, row, scale, vocab_size, CHUNK, C)
        lower = tl.full((), float("-inf"), tl.float32)
        upper = tl.full((), float("-inf"), tl.float32)
        if status == 1:
            k, p = tl.load(top_k + row), tl.load(top_p + row)
            has_top_k = (k > 0) & (k < vocab_size)
            has_top_p = p < 1.0
            i = tl.arange(0, NUM_PIVOTS)
            chunks = tl.arange(0, C)
            at = (row * C + chunks[:, None]) * NUM_PIVOTS + i[None, :]
            num_chunks = tl.cdiv(vocab_size, CHUNK)
            num_counted, num_weighed = tl.where(has_top_k, num_chunks, 0), tl.where(has_top_p, num_chunks, 0)
            count = tl.sum(tl.load(counts + at, mask=chunks[:, None] < num_counted, other=0), axis=0)
            mass = tl.sum(tl.load(masses + at, mask=chunks[:, None] < num_weighed, other=0.0), axis=0)
            # The cut is below as many pivots as have too little above them; beyond the last all is negligible.
            by_count = tl.sum((count < k).to(tl.int32), axis=0)
            total = tl.sum(chunk_masses, axis=0)
            least_total = tl.where(has_top_k, tl.sum(tl.where(i == by_count - 1, mass, 0.0), axis=0), total)
            most = tl.sum(tl.where(i == tl.minimum(by_count, NUM_PIVOTS - 1), mass, 0.0), axis=0)
            by_least = tl.sum((mass < p * least_total).to(tl.int32), axis=0)
            by_most = tl.sum((mass < p * tl.where(has_top_k, most, total)).to(tl.int32), axis=0)
            last = tl.where(has_top_k, by_count, by_most)
            first = tl.where(has_top_p, tl.minimum(by_least, last), last)
            values = tl.load(pivots + row * NUM_PIVOTS + i)
            lower = tl.sum(tl.where(i == tl.minimum(last, NUM_PIVOTS - 1), values, 0.0), axis=0)
            upper = tl.where(first > 0, tl.sum(tl.where(i == first - 1, values, 0.0), axis=0), float("inf"))
            tl.store(cut + row * NUM_PIVOTS, lower, mask=chunk == 0)
            tl.store(cut + row * NUM_PIVOTS + 1, upper, mask=chunk == 0)
        out = row * C + chunk
        if tl.load(chunk_max + row * C + chunk) >= lower:
            x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
            weight = tl.exp2((x - largest) * scale)
            num = tl.sum(((x >= lower) & (x < upper)).to(tl.int32), axis=0)
            weight = tl.where(x >= upper, weight, 0.0)
            tl.store(num_listed + out, num)
            tl.store(num_above + out, tl.sum((x >= upper).to(tl.int32), axis=0))
            tl.store(mass_above + out, tl.sum(weight, axis=0))
            tl.store(kept_above + out, tl.sum(tl.where(weight >= m, weight, 0.0), axis=0))
            if num > 0:
                # Loaded again: few chunks come here, and to keep it would cost all of them registers.
                x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
                is_listed = (x >= lower) & (x < upper)
                place = tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
                start = (row.to(tl.int64) * tl.cdiv(vocab_size, CHUNK) + chunk) * CHUNK
                tl.store(listed + start + place, x.to(listed.dtype.element_ty), mask=is_listed)
        else:
            tl.store(num_listed + out, 0)
            tl.store(num_above + out, 0)
            tl.store(mass_above + out, 0.0)
            tl.store(kept_above + out, 0.0)


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """An integer that is ordered as the float32 is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number with this key, of which the `SHIFT` bits that bfloat16 does not have were dropped."""
    key = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_lists(rows, lengths, start, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns `start` to `start` + WIDTH of the lists at `rows` [C, 1], -inf beyond `lengths` [C, 1]."""
    columns = start + tl.arange(0, WIDTH)[None, :]
    # A mask that is the same for eight neighbours lets their loads be one.
    x = tl.load(rows + columns, mask=columns // 8 * 8 < lengths, other=float("-inf")).to(tl.float32)
    return tl.where(columns < lengths, x, float("-inf"))


@triton.jit
def _bisect(  # type: ignore[no-untyped-def]
    rows,
    lengths,
    lower,
    upper,
    count_above,
    mass_above,
    largest,
    scale,
    target,
    BY_COUNT: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Find the largest of the listed logits with a count or mass of at least `target` from it upwards.

    The lists at `rows` [C, 1] have `lengths` [C, 1] logits in [lower, upper), `count_above` and `mass_above` belong to
    what is not below `upper`. Returns the logit, how many equal it, and the count and mass above it.
    """
    num_columns = tl.max(lengths)
    low = _key(lower) >> SHIFT
    high = tl.where(upper == float("inf"), (_key(largest) >> SHIFT) + 1, (_key(upper) + ((1 << SHIFT) - 1)) >> SHIFT)
    count_high = count_above
    count_low = count_above + tl.sum(lengths)
    # From `low` upwards there is enough, from `high`, and from `upper`, there is not: these two part the list alike.
    while (low + 1 < high) & (count_low - count_high > 1):
        middle = (low & high) + ((low ^ high) >> 1)
        value = _value(middle, SHIFT)
        counts = tl.zeros((C, WIDTH), tl.int32)
        masses = tl.zeros((C, WIDTH), tl.float32)
        for start in range(0, num_columns, WIDTH):
            x = _load_lists(rows, lengths, start, WIDTH)
            counts += (x >= value).to(tl.int32)
            if not BY_COUNT:
                masses += tl.where(x >= value, tl.exp2((x - largest) * scale), 0.0)
        count = count_above + tl.sum(counts)
        is_enough = count >= target if BY_COUNT else mass_above + tl.sum(masses) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        upper = tl.where(is_enough, upper, value)
        count_low = tl.where(is_enough, count, count_low)
        count_high = tl.where(is_enough, count_high, count)
    # What is left are equal logits.
    found = tl.full((C, WIDTH), float("-inf"), tl.float32)
    masses = tl.zeros((C, WIDTH), tl.float32)
    for start in range(0, num_columns, WIDTH):
        x = _load_lists(rows, lengths, start, WIDTH)
        found = tl.maximum(found, tl.where(x < upper, x, float("-inf")))
        masses += tl.where(x >= upper, tl.exp2((x - largest) * scale), 0.0)
    num_equal = count_low - count_high
    # Nothing is left where rounding says that what is above the list is enough, or that all of it is not.
    below = _value(_key(upper) - 1, 0)
    value = tl.where(num_equal > 0, tl.max(found), below)
    return value, num_equal, count_high, mass_above + tl.sum(masses)


# No variant without filters: another layout adds in another order, and would tell a plain row what its neighbours are.
@triton.jit(do_not_specialize=["has_filters"])
def _draw(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    chunk_max,
    chunk_sum,
    state,
    cut,
    listed,
    num_listed,
    num_above,
    mass_above,
    kept_above,
    token_ids,
    row_stride,
    vocab_size,
    has_filters,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Find a row's cut, the chunk that its uniform number falls into, and the token there."""
    row = tl.program_id(0)
    t = tl.load(temperature + row)
    scale = _exponent_scale(t)
    maxima, masses, largest = _load_row(chunk_max, chunk_sum, row, scale, vocab_size, CHUNK, C)
    chunks = tl.arange(0, C)
    is_greedy = (t <= 0) | (tl.sum(masses, axis=0) <= 0)
    # Kept is what weighs `m`, exceeds `threshold`, and of what equals it so many in each chunk as `quotas` says.
    m = tl.full((), 0.0, tl.float32)
    threshold = tl.full((), float("-inf"), tl.float32)
    quotas = tl.zeros((C,), tl.int32)
    if has_filters != 0:
        status = tl.load(state + row)
        is_greedy = is_greedy | (status == 2)
        m = tl.load(min_p + row)
        if ((status == 1) | (m > 0)) & (is_greedy == 0):
            num_chunks = tl.cdiv(vocab_size, CHUNK)
            at = row * C + chunks
            masses = tl.load(kept_above + at, mask=chunks < num_chunks, other=0.0)
            if status == 1:
                k, p = tl.load(top_k + row), tl.load(top_p + row)
                lower, upper = tl.load(cut + row * NUM_PIVOTS), tl.load(cut + row * NUM_PIVOTS + 1)
                rows = (listed + (row.to(tl.int64) * num_chunks + chunks) * CHUNK)[:, None]
                lengths = tl.load(num_listed + at, mask=chunks < num_chunks, other=0)[:, None]
                count = tl.sum(tl.load(num_above + at, mask=chunks < num_chunks, other=0), axis=0)
                mass = tl.sum(tl.load(mass_above + at, mask=chunks < num_chunks, other=0.0), axis=0)
                quota = tl.full((), 0x7FFFFFFF, tl.int32)
                kept = tl.sum(
                    tl.load(chunk_sum + at, mask=chunks < num_chunks, other=0.0) * tl.exp2((maxima - largest) * scale),
                    axis=0,
                )
                if (k > 0) & (k < vocab_size):
                    threshold, num_equal, num_more, more = _bisect(
                        rows, lengths, lower, upper, count, mass, largest, scale, k, True, C, WIDTH, SHIFT
                    )
                    quota = k - num_more
                    kept = more + tl.minimum(quota, num_equal).to(tl.float32) * tl.exp2((threshold - largest) * scale)
                if p < 1.0:
                    target = p * kept
                    value, num_equal, num_more, more = _bisect(
                        rows, lengths, lower, upper, count, mass, largest, scale, target, False, C, WIDTH, SHIFT
                    )
                    weight = tl.maximum(tl.exp2((value - largest) * scale), 1e-37)
                    needed = tl.maximum(tl.ceil(tl.minimum((target - more) / weight, 1e9)).to(tl.int32), 1)
                    quota = tl.where(
                        value < threshold, quota, tl.where(value > threshold, needed, tl.minimum(quota, needed))
                    )
                    threshold = tl.maximum(threshold, value)
                more = tl.zeros((C, WIDTH), tl.float32)
                equal = tl.zeros((C, WIDTH), tl.int32)
                for start in range(0, tl.max(lengths), WIDTH):
                    x = _load_lists(rows, lengths, start, WIDTH)
                    weight = tl.exp2((x - largest) * scale)
                    more += tl.where((x > threshold) & (weight >= m), weight, 0.0)
                    equal += (x == threshold).to(tl.int32)
                num_equals = tl.sum(equal, axis=1)
                quotas = tl.minimum(tl.maximum(quota - (tl.cumsum(num_equals, axis=0) - num_equals), 0), num_equals)
                weight = tl.exp2((threshold - largest) * scale)
                masses += tl.sum(more, axis=1) + quotas.to(tl.float32) * tl.where(weight >= m, weight, 0.0)
    target = tl.load(uniform + row) * tl.sum(masses, axis=0)
    cumulative = tl.cumsum(masses, axis=0)
    # Rounding may leave nothing beyond the target: the last is meant.
    chunk = tl.min(tl.where((cumulative > target) & (masses > 0), chunks, C), axis=0)
    chunk = tl.where(chunk < C, chunk, tl.max(tl.where(masses > 0, chunks, 0), axis=0))
    target -= tl.sum(tl.where(chunks == chunk - 1, cumulative, 0.0), axis=0)
    maximum = tl.max(maxima, axis=0)
    chunk = tl.where(is_greedy, tl.min(tl.where(maxima == maximum, chunks, C), axis=0), chunk)
    x = _load_chunk(logits, row, chunk, row_stride, vocab_size, CHUNK)
    index = tl.arange(0, CHUNK)
    weight = tl.exp2((x - largest) * scale)
    is_equal = x == threshold
    is_within = tl.cumsum(is_equal.to(tl.int32), axis=0) <= tl.sum(tl.where(chunks == chunk, quotas, 0), axis=0)
    is_kept = (weight > 0) & (weight >= m) & ((x > threshold) | (is_equal & is_within))
    is_beyond = tl.cumsum(tl.where(is_kept, weight, 0.0), axis=0) > target
    drawn = tl.min(tl.where(is_kept & is_beyond, index, CHUNK), axis=0)
    drawn = tl.where(drawn < CHUNK, drawn, tl.max(tl.where(is_kept, index, 0), axis=0))
    drawn = tl.where(is_greedy, tl.min(tl.where(x == maximum, index, CHUNK), axis=0), drawn)
    tl.store(token_ids + row, chunk * CHUNK + drawn)
