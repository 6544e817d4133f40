"""The gradients of flash attention: one kernel adds up those of a block of queries, one those of a block of keys.

    P = exp(scale q k^T + bias - lse)      dP = do v^T      dS = P (dP - delta)      delta = sum(do o)
    dq = scale dS k                        dk = scale dS^T q                         dv = P^T do

Both compute P again. Each sum belongs to one program, which adds in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.ops.triton.attention_kernels import (
    BOUNDED_,
    LOG2_E,
    WINDOW_,
    add_dot,
    count_of,
    keys_of,
    load_parts,
    place_of,
    queries_of,
    runs_of,
    scores_of,
    store,
)


@triton.jit
def _query_gradient_blocks(
    front_sum, back_sum, query, query_back, above, above_back, keys, values, key_stride, value_stride, a, b, c, d,
    num_keys, position, first, last, log_sum, delta, scale, slope,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr, HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq / scale of a block of queries what one run of blocks of keys gives it."""
    columns = tl.arange(0, KEYS)
    for index in range(count_of(a, b, c, d, KEYS, MASKED)):
        start = place_of(index, a, b, c, d, KEYS, MASKED)
        far = tl.cast(start, tl.int64)
        key, key_back = load_parts(
            keys + far * key_stride, key_stride, columns, num_keys - start, DIM, FRONT, BACK, MASKED
        )
        value, value_back = load_parts(
            values + far * value_stride, value_stride, columns, num_keys - start, DIM, FRONT, BACK, MASKED
        )
        scores = scores_of(query, query_back, key, key_back, BACK, UPCAST, PRECISION) * scale
        if HAS_SLOPES:
            scores -= slope * (position[:, None] - (start + columns)[None, :]).to(tl.float32)
        weights = tl.exp2(scores - log_sum[:, None])
        if MASKED:
            seen = (start + columns)[None, :] <= last[:, None]
            if KIND == WINDOW_ or KIND == BOUNDED_:
                seen = seen & ((start + columns)[None, :] >= first[:, None])
            weights = tl.where(seen, weights, 0.0)
        of_weights = scores_of(above, above_back, value, value_back, BACK, UPCAST, PRECISION)
        of_scores = (weights * (of_weights - delta[:, None])).to(key.dtype)
        front_sum = add_dot(of_scores, key, front_sum, UPCAST, PRECISION)
        if BACK > 0:
            back_sum = add_dot(of_scores, key_back, back_sum, UPCAST, PRECISION)
    return front_sum, back_sum


@triton.jit
def query_gradient(
    queries, keys, values, outputs, upstream, log_sums, deltas, gradient, firsts, lasts, slopes, scale,
    num_queries, num_keys, offset, window, group, bounds_stride,
    query_stride_b, query_stride_n, query_stride_s, key_stride_b, key_stride_n, key_stride_s,
    value_stride_b, value_stride_n, value_stride_s, output_stride_b, output_stride_n, output_stride_s,
    above_stride_b, above_stride_n, above_stride_s, gradient_stride_b, gradient_stride_n, gradient_stride_s,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    KIND: tl.constexpr, HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, and delta = sum(do o) of each query for the kernel of the keys."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = block * QUERIES
    far = start.to(tl.int64)
    rows = tl.arange(0, QUERIES)
    count = num_queries - start
    queries += batch * query_stride_b + head * query_stride_n + far * query_stride_s
    keys += batch * key_stride_b + head // group * key_stride_n
    values += batch * value_stride_b + head // group * value_stride_n
    outputs += batch * output_stride_b + head * output_stride_n + far * output_stride_s
    upstream += batch * above_stride_b + head * above_stride_n + far * above_stride_s
    gradient += batch * gradient_stride_b + head * gradient_stride_n + far * gradient_stride_s
    place = (batch * tl.num_programs(1) + head) * num_queries + far
    firsts += batch * bounds_stride
    lasts += batch * bounds_stride
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + head) * LOG2_E
    above, above_back = load_parts(upstream, above_stride_s, rows, count, DIM, FRONT, BACK, True)
    output, output_back = load_parts(outputs, output_stride_s, rows, count, DIM, FRONT, BACK, True)
    delta = tl.sum(above.to(tl.float32) * output.to(tl.float32), axis=1)
    if BACK > 0:
        delta += tl.sum(above_back.to(tl.float32) * output_back.to(tl.float32), axis=1)
    tl.store(deltas + place + rows, delta, mask=rows < count)
    log_sum = tl.load(log_sums + place + rows, mask=rows < count, other=float("inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum) * LOG2_E  # who saw nothing has no weights
    first, last = keys_of(start + rows, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    low, inner_high = keys_of(start, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    final = tl.minimum(start + QUERIES, num_queries) - 1
    inner_low, high = keys_of(final, firsts, lasts, num_queries, num_keys, offset, window, KIND)
    a, b, c, d = runs_of(low, high + 1, inner_low, inner_high + 1, KEYS)
    query, query_back = load_parts(queries, query_stride_s, rows, count, DIM, FRONT, BACK, True)
    front_sum = tl.zeros((QUERIES, FRONT), tl.float32)
    back_sum = front_sum
    if BACK > 0:
        back_sum = tl.zeros((QUERIES, BACK), tl.float32)
    position = start + rows + offset
    front_sum, back_sum = _query_gradient_blocks(
        front_sum, back_sum, query, query_back, above, above_back, keys, values, key_stride_s, value_stride_s,
        a, b, c, d, num_keys, position, first, last, log_sum, delta, scale * LOG2_E, slope,
        DIM, FRONT, BACK, KEYS, False, KIND, HAS_SLOPES, UPCAST, PRECISION,
    )  # fmt: skip
    front_sum, back_sum = _query_gradient_blocks(
        front_sum, back_sum, query, query_back, above, above_back, keys, values, key_stride_s, value_stride_s,
        a, b, c, d, num_keys, position, first, last, log_sum, delta, scale * LOG2_E, slope,
        DIM, FRONT, BACK, KEYS, True, KIND, HAS_SLOPES, UPCAST, PRECISION,
    )  # fmt: skip
    store(gradient, gradient_stride_s, rows, count, front_sum * scale, DIM, 0, FRONT)
    if BACK > 0:
        store(gradient, gradient_stride_s, rows, count, back_sum * scale, DIM, FRONT, BACK)


@triton.jit
def _key_gradient_blocks(
    key_sum, key_sum_back, value_sum, value_sum_back, key, key_back, value, value_back, queries, upstream, log_sums,
    deltas, query_stride, above_stride, a, b, c, d, num_queries, columns, offset, begin, end, scale, slope,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
    HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk / scale and dv of a block of keys what one run of blocks of queries gives them."""
    rows = tl.arange(0, QUERIES)
    for index in range(count_of(a, b, c, d, QUERIES, MASKED)):
        place = place_of(index, a, b, c, d, QUERIES, MASKED)
        far = tl.cast(place, tl.int64)
        count = num_queries - place
        query, query_back = load_parts(
            queries + far * query_stride, query_stride, rows, count, DIM, FRONT, BACK, MASKED
        )
        above, above_back = load_parts(
            upstream + far * above_stride, above_stride, rows, count, DIM, FRONT, BACK, MASKED
        )
        if MASKED:
            log_sum = tl.load(log_sums + place + rows, mask=rows < count, other=float("inf"))
            delta = tl.load(deltas + place + rows, mask=rows < count, other=0.0)
        else:
            log_sum, delta = tl.load(log_sums + place + rows), tl.load(deltas + place + rows)
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum) * LOG2_E
        scores = scores_of(key, key_back, query, query_back, BACK, UPCAST, PRECISION) * scale  # [keys, queries]
        if HAS_SLOPES:
            scores -= slope * ((place + rows + offset)[None, :] - columns[:, None]).to(tl.float32)
        weights = tl.exp2(scores - log_sum[None, :])
        if MASKED:
            row = (place + rows)[None, :]
            weights = tl.where((row >= begin[:, None]) & (row <= end[:, None]), weights, 0.0)
        shares = weights.to(above.dtype)
        value_sum = add_dot(shares, above, value_sum, UPCAST, PRECISION)
        if BACK > 0:
            value_sum_back = add_dot(shares, above_back, value_sum_back, UPCAST, PRECISION)
        of_weights = scores_of(value, value_back, above, above_back, BACK, UPCAST, PRECISION)
        of_scores = (weights * (of_weights - delta[None, :])).to(query.dtype)
        key_sum = add_dot(of_scores, query, key_sum, UPCAST, PRECISION)
        if BACK > 0:
            key_sum_back = add_dot(of_scores, query_back, key_sum_back, UPCAST, PRECISION)
    return key_sum, key_sum_back, value_sum, value_sum_back


@triton.jit
def key_gradient(
    queries, keys, values, upstream, log_sums, deltas, key_gradients, value_gradients, begins, ends, slopes, scale,
    num_queries, num_keys, offset, window, group, bounds_stride,
    query_stride_b, query_stride_n, query_stride_s, key_stride_b, key_stride_n, key_stride_s,
    value_stride_b, value_stride_n, value_stride_s, above_stride_b, above_stride_n, above_stride_s,
    gradient_stride_b, gradient_stride_n, gradient_stride_s,
    DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    KIND: tl.constexpr, HAS_SLOPES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys: one program adds up all the query heads that share them, in their order."""
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * KEYS
    far = start.to(tl.int64)
    rows = tl.arange(0, KEYS)
    count = num_keys - start
    keys += batch * key_stride_b + kv_head * key_stride_n + far * key_stride_s
    values += batch * value_stride_b + kv_head * value_stride_n + far * value_stride_s
    queries += batch * query_stride_b + kv_head * group * query_stride_n
    upstream += batch * above_stride_b + kv_head * group * above_stride_n
    place = (batch * tl.num_programs(1) + kv_head) * group * num_queries
    begins += batch * bounds_stride
    ends += batch * bounds_stride
    begin, end = queries_of(start + rows, begins, ends, num_queries, num_keys, offset, window, KIND)
    low, inner_high = queries_of(start, begins, ends, num_queries, num_keys, offset, window, KIND)
    final = tl.minimum(start + KEYS, num_keys) - 1
    inner_low, high = queries_of(final, begins, ends, num_queries, num_keys, offset, window, KIND)
    a, b, c, d = runs_of(low, high + 1, inner_low, inner_high + 1, QUERIES)
    key, key_back = load_parts(keys, key_stride_s, rows, count, DIM, FRONT, BACK, True)
    value, value_back = load_parts(values, value_stride_s, rows, count, DIM, FRONT, BACK, True)
    key_sum, value_sum = tl.zeros((KEYS, FRONT), tl.float32), tl.zeros((KEYS, FRONT), tl.float32)
    key_sum_back, value_sum_back = key_sum, value_sum
    if BACK > 0:
        key_sum_back, value_sum_back = tl.zeros((KEYS, BACK), tl.float32), tl.zeros((KEYS, BACK), tl.float32)
    for member in range(group):
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(slopes + kv_head * group + member) * LOG2_E
        key_sum, key_sum_back, value_sum, value_sum_back = _key_gradient_blocks(
            key_sum, key_sum_back, value_sum, value_sum_back, key, key_back, value, value_back, queries, upstream,
            log_sums + place, deltas + place, query_stride_s, above_stride_s, a, b, c, d, num_queries, start + rows,
            offset, begin, end, scale * LOG2_E, slope,
            DIM, FRONT, BACK, QUERIES, False, HAS_SLOPES, UPCAST, PRECISION,
        )  # fmt: skip
        key_sum, key_sum_back, value_sum, value_sum_back = _key_gradient_blocks(
            key_sum, key_sum_back, value_sum, value_sum_back, key, key_back, value, value_back, queries, upstream,
            log_sums + place, deltas + place, query_stride_s, above_stride_s, a, b, c, d, num_queries, start + rows,
            offset, begin, end, scale * LOG2_E, slope,
            DIM, FRONT, BACK, QUERIES, True, HAS_SLOPES, UPCAST, PRECISION,
        )  # fmt: skip
        queries += query_stride_n
        upstream += above_stride_n
        place += num_queries
    key_gradients += batch * gradient_stride_b + kv_head * gradient_stride_n + far * gradient_stride_s
    value_gradients += batch * gradient_stride_b + kv_head * gradient_stride_n + far * gradient_stride_s
    store(key_gradients, gradient_stride_s, rows, count, key_sum * scale, DIM, 0, FRONT)
    store(value_gradients, gradient_stride_s, rows, count, value_sum, DIM, 0, FRONT)
    if BACK > 0:
        store(key_gradients, gradient_stride_s, rows, count, key_sum_back * scale, DIM, FRONT, BACK)
        store(value_gradients, gradient_stride_s, rows, count, value_sum_back, DIM, FRONT, BACK)
