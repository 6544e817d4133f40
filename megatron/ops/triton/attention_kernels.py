"""The kernel of flash attention, and how it walks over what is seen; `attention.py` beside this file starts it.

Query i sees the keys [first_i, last_i], neither of which falls as i rises: causality, windows, documents and padding
are all of that kind, and so is what they look like from a key j, which the queries [begin_j, end_j] see. A block of
queries therefore meets three runs of blocks of keys: some at the left edge, which need masks, those in the middle,
which every query of the block sees whole, and some at the right edge. What lies outside is never touched. The kernels
of `attention_gradients.py` walk in the same way, that of the keys over queries.

    FULL      every key             CAUSAL    keys up to i + offset           WINDOW    the last `window` + 1 of these
    BOUNDED   [first_i, last_i] and [begin_j, end_j] are read from memory

A head of d features that is no power of two is cut in two parts that are, FRONT and BACK features wide, so that 80 and
96 features cost 80 and 96, and not 128. Softmax is computed with powers of two: exp(x) = 2^(x log2 e).
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL, CAUSAL, WINDOW, BOUNDED = range(4)

CAUSAL_, WINDOW_, BOUNDED_ = (tl.constexpr(kind) for kind in (CAUSAL, WINDOW, BOUNDED))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def dot(left, right, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Return left right in fp32; UPCAST: products of fp32, because the interpreter cannot multiply bf16."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def add_dot(left, right, sums, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Return sums + left right."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def load(base, stride, rows, count, DIM: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Return SIZE features from START on of each row: [r, SIZE]. MASKED: rows from `count` on are zeros."""
    features = START + tl.arange(0, SIZE)
    places = base + rows[:, None] * stride + features[None, :]
    if MASKED:
        if START + SIZE > DIM:
            tile = tl.load(places, mask=(rows < count)[:, None] & (features < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(places, mask=(rows < count)[:, None], other=0.0)
    else:
        if START + SIZE > DIM:
            tile = tl.load(places, mask=(features < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(places)
    return tile


@triton.jit
def load_parts(
    base, stride, rows, count, DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, MASKED: tl.constexpr
):
    """Return the front and the back features of rows; without a back, the front twice."""
    front = load(base, stride, rows, count, DIM, 0, FRONT, MASKED)
    back = front
    if BACK > 0:
        back = load(base, stride, rows, count, DIM, FRONT, BACK, MASKED)
    return front, back


@triton.jit
def store(base, stride, rows, count, tile, DIM: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """Write SIZE features from START on of the first `count` rows."""
    features = START + tl.arange(0, SIZE)
    inside = (rows < count)[:, None] & (features < DIM)[None, :]
    tl.store(base + rows[:, None] * stride + features[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def scores_of(
    one, one_back, other, other_back, BACK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return one other^T, [r, c] fp32."""
    scores = dot(one, tl.trans(other), UPCAST, PRECISION)
    if BACK > 0:
        scores = add_dot(one_back, tl.trans(other_back), scores, UPCAST, PRECISION)
    return scores


@triton.jit
def keys_of(query, firsts, lasts, num_queries, num_keys, offset, window, KIND: tl.constexpr):
    """Return first_i and last_i of queries i, one number or several."""
    first, last = query * 0, query * 0 + num_keys - 1
    if KIND == BOUNDED_:
        query = tl.minimum(query, num_queries - 1)
        first, last = tl.load(firsts + query), tl.load(lasts + query)
    if KIND == CAUSAL_ or KIND == WINDOW_:
        last = tl.minimum(query + offset, num_keys - 1)
    if KIND == WINDOW_:
        first = tl.maximum(query + offset - window, 0)
    return first, last


@triton.jit
def queries_of(key, begins, ends, num_queries, num_keys, offset, window, KIND: tl.constexpr):
    """Return begin_j and end_j of keys j, one number or several."""
    begin, end = key * 0, key * 0 + num_queries - 1
    if KIND == BOUNDED_:
        key = tl.minimum(key, num_keys - 1)
        begin, end = tl.load(begins + key), tl.load(ends + key)
    if KIND == CAUSAL_ or KIND == WINDOW_:
        begin = tl.maximum(key - offset, 0)
    if KIND == WINDOW_:
        end = tl.minimum(key - offset + window, num_queries - 1)
    return begin, end


@triton.jit
def runs_of(low, high, inner_low, inner_high, BLOCK: tl.constexpr):
    """Return a, b, c, d, multiples of BLOCK: blocks of [a, b) and of [c, d) are seen in part, those of [b, c) whole.

    [low, high) is what any row sees, [inner_low, inner_high) what every row sees.
    """
    a = low // BLOCK * BLOCK
    d = (tl.maximum(high, a) + BLOCK - 1) // BLOCK * BLOCK
    b = tl.minimum(tl.maximum((inner_low + BLOCK - 1) // BLOCK * BLOCK, a), d)
    c = tl.maximum(tl.minimum(inner_high, d) // BLOCK * BLOCK, b)
    return a, b, c, d


@triton.jit
def place_of(index, a, b, c, d, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """Return where block number `index` begins: of the blocks [b, c), or with EDGES of those of [a, b) and [c, d)."""
    place = b + index * BLOCK
    if EDGES:
        place = tl.where(index * BLOCK < b - a, a + index * BLOCK, c - (b - a) + index * BLOCK)
    return tl.multiple_of(place, BLOCK)


@triton.jit
def count_of(a, b, c, d, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """Return how many blocks that are."""
    count = (c - b) // BLOCK
    if EDGES:
        count = (b - a + d - c) // BLOCK
    return count


@triton.jit
def _attend_blocks(
    front_sum, back_sum, total, most, query, query_back, keys, values, key_stride, value_stride, a, b, c, d, num_keys,
    position, first, last, scale, slope,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr, HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the blocks of keys of one run to a block of queries. scale, slope: of powers of two."""
    columns = tl.arange(0, KEYS)
    for index in range(count_of(a, b, c, d, KEYS, MASKED)):
        start = place_of(index, a, b, c, d, KEYS, MASKED)
        far = tl.cast(start, tl.int64)
        key, key_back = load_parts(
            keys + far * key_stride, key_stride, columns, num_keys - start, DIM, FRONT, BACK, MASKED
        )
        scores = scores_of(query, query_back, key, key_back, BACK, UPCAST, PRECISION)
        if HAS_SLOPES:
            distance = position[:, None] - (start + columns)[None, :]
            scores = scores * scale - slope * distance.to(tl.float32)
        if MASKED:
            seen = (start + columns)[None, :] <= last[:, None]
            if KIND == WINDOW_ or KIND == BOUNDED_:
                seen = seen & ((start + columns)[None, :] >= first[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        if HAS_SLOPES:
            above = tl.maximum(most, tl.max(scores, axis=1))
            weights = tl.exp2(scores - above[:, None])
        else:
            above = tl.maximum(most, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - above[:, None])
        shrink = tl.exp2(most - above)
        total = total * shrink + tl.sum(weights, axis=1)
        most = above
        value, value_back = load_parts(
            values + far * value_stride, value_stride, columns, num_keys - start, DIM, FRONT, BACK, MASKED
        )
        weights = weights.to(value.dtype)
        front_sum = add_dot(weights, value, front_sum * shrink[:, None], UPCAST, PRECISION)
        if BACK > 0:
            back_sum = add_dot(weights, value_back, back_sum * shrink[:, None], UPCAST, PRECISION)
    return front_sum, back_sum, total, most


@triton.jit
def forward(
    queries, keys, values, outputs, log_sums, firsts, lasts, slopes, scale, num_queries, num_keys, offset, window,
    group, bounds_stride,
    query_stride_b, query_stride_n, query_stride_s, key_stride_b, key_stride_n, key_stride_s,
    value_stride_b, value_stride_n, value_stride_s, output_stride_b, output_stride_n, output_stride_s,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    KIND: tl.constexpr, HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output of a block of queries, and its log-sum-exps."""
    # The last queries of a causal head have the most work: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = block * QUERIES
    far = start.to(tl.int64)
    rows = tl.arange(0, QUERIES)
    queries += batch * query_stride_b + head * query_stride_n + far * query_stride_s
    keys += batch * key_stride_b + head // group * key_stride_n
    values += batch * value_stride_b + head // group * value_stride_n
    outputs += batch * output_stride_b + head * output_stride_n + far * output_stride_s
    log_sums += (batch * tl.num_programs(1) + head) * num_queries + far
    firsts += batch * bounds_stride
    lasts += batch * bounds_stride
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head) * LOG2_E
    scale *= LOG2_E
    first, last = keys_of(start + rows, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    low, inner_high = keys_of(start, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    final = tl.minimum(start + QUERIES, num_queries) - 1
    inner_low, high = keys_of(final, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    a, b, c, d = runs_of(low, high + 1, inner_low, inner_high + 1, KEYS)
    query, query_back = load_parts(queries, query_stride_s, rows, num_queries - start, DIM, FRONT, BACK, True)
    front_sum = tl.zeros((QUERIES, FRONT), tl.float32)
    back_sum = front_sum
    if BACK > 0:
        back_sum = tl.zeros((QUERIES, BACK), tl.float32)
    total, most = tl.zeros((QUERIES,), tl.float32), tl.full((QUERIES,), LOWEST, tl.float32)
    position = start + rows + offset
    front_sum, back_sum, total, most = _attend_blocks(
        front_sum, back_sum, total, most, query, query_back, keys, values, key_stride_s, value_stride_s, a, b, c, d,
        num_keys, position, first, last, scale, slope,
        DIM, FRONT, BACK, KEYS, False, KIND, HAS_SLOPES, UPCAST, PRECISION,
    )  # fmt: skip
    front_sum, back_sum, total, most = _attend_blocks(
        front_sum, back_sum, total, most, query, query_back, keys, values, key_stride_s, value_stride_s, a, b, c, d,
        num_keys, position, first, last, scale, slope,
        DIM, FRONT, BACK, KEYS, True, KIND, HAS_SLOPES, UPCAST, PRECISION,
    )  # fmt: skip
    saw = total > 0.0
    share = 1.0 / tl.where(saw, total, 1.0)
    store(outputs, output_stride_s, rows, num_queries - start, front_sum * share[:, None], DIM, 0, FRONT)
    if BACK > 0:
        store(outputs, output_stride_s, rows, num_queries - start, back_sum * share[:, None], DIM, FRONT, BACK)
    log_sum = tl.where(saw, most * LN_2 + tl.log(tl.where(saw, total, 1.0)), float("-inf"))
    tl.store(log_sums + rows, log_sum, mask=rows < num_queries - start)
