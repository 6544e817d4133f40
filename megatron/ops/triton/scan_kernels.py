"""The kernels of `megatron.ops.triton.scan`: a program takes a chunk of tokens and some channels, with all states.

    h[t] = exp(d[t] A) h[t-1] + d[t] u[t] B[t]      g[t] = C[t] dy[t] + exp(d[t+1] A) g[t+1]

Rows of u, delta, z, b, c and of the upstream gradient are given by strides; what is written is contiguous. A is [e, n],
`skip` (the paper's D) and `bias` [e], all three fp32 and contiguous. exp(d A) h[t-1] is got as h[t] less what was
added to it, so its absolute error is that of a rounded h[t].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine(first_decay, first_value, decay, value):
    """Join two stretches of h -> decay * h + value."""
    return first_decay * decay, decay * first_value + value


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + exp(-x)) without overflow."""
    grown = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, grown) / (1.0 + grown)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)), exact for small exp(x) too (Kahan's log1p)."""
    grown = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + grown
    is_small = above == 1.0
    logarithm = tl.log(above) * (grown / tl.where(is_small, 1.0, above - 1.0))
    return tl.where(x > 20.0, x, tl.where(is_small, grown, logarithm))


@triton.jit
def _load(rows, stride, tokens, columns, mask):
    """Return rows[tokens, columns] as fp32, 0 where the mask is false."""
    return tl.load(rows + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_delta(delta, stride, tokens, columns, mask, bias):
    """Return delta + bias; where the mask is false, so little that its softplus is 0 and the state stands still."""
    return tl.where(mask, _load(delta, stride, tokens, columns, mask) + bias[None, :], -200.0)


@triton.jit
def states(
    u, delta, matrix_a, matrix_b, bias, starts, states, sums, length, channels, num_states, u_stride, delta_stride,
    b_stride,
    OF_TILES: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """A chunk's own part of the state [e, n] at its end, and the sum [e] of its d.

    OF_TILES: from the states that chunks start with, those that tiles start with, and no sum.
    """
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = batch * tl.num_programs(1) + chunk
    channel, state = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    is_channel, is_state = channel < channels, state < num_states
    is_pair, pair = is_channel[:, None] & is_state[None, :], channel[:, None] * num_states + state[None, :]
    decay = tl.load(matrix_a + pair, mask=is_pair, other=0.0)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0)
    current = tl.zeros((CHANNELS, STATES), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    if OF_TILES:
        current = tl.load(starts + index * channels * num_states + pair, mask=is_pair, other=0.0)
    for begin in range(0, CHUNK, TILE):
        if OF_TILES:
            tile = index * (CHUNK // TILE) + begin // TILE
            tl.store(states + tile * channels * num_states + pair, current, mask=is_pair)
        token = chunk * CHUNK + begin + tl.arange(0, TILE)
        is_token, row = token < length, batch * length + token
        inside = is_token[:, None] & is_channel[None, :]
        d = _softplus(_load_delta(delta, delta_stride, row, channel, inside, shift))
        sum_d = tl.sum(d, axis=0)
        later = sum_d[None, :] - tl.cumsum(d, axis=0)
        du = d * _load(u, u_stride, row, channel, inside)
        b = _load(matrix_b, b_stride, row, state, is_token[:, None] & is_state[None, :])
        added = tl.sum(tl.exp(later[:, :, None] * decay[None, :, :]) * du[:, :, None] * b[:, None, :], axis=0)
        current = current * tl.exp(sum_d[:, None] * decay) + added
        total += sum_d
    if not OF_TILES:
        tl.store(states + index * channels * num_states + pair, current, mask=is_pair)
        tl.store(sums + index * channels + channel, total, mask=is_channel)


@triton.jit
def between(
    states, sums, matrix_a, num_chunks, channels, num_states,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Turn the chunks' own parts, in place, into the sum of what earlier chunks left (REVERSE: later ones)."""
    batch = tl.program_id(1).to(tl.int64)
    channel, state = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    is_channel = channel < channels
    is_pair = is_channel[:, None] & (state < num_states)[None, :]
    pair = channel[:, None] * num_states + state[None, :]
    decay = tl.load(matrix_a + pair, mask=is_pair, other=0.0)
    current = tl.zeros((CHANNELS, STATES), tl.float32)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        index = batch * num_chunks + chunk
        place = states + index * channels * num_states + pair
        own = tl.load(place, mask=is_pair, other=0.0)
        total = tl.load(sums + index * channels + channel, mask=is_channel, other=0.0)
        tl.store(place, current, mask=is_pair)
        current = current * tl.exp(total[:, None] * decay) + own


@triton.jit
def outputs(
    u, delta, matrix_a, matrix_b, matrix_c, skip, z, bias, starts, output, length, channels, num_states, u_stride,
    delta_stride, b_stride, c_stride, z_stride,
    HAS_Z: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The outputs [b, s, e], contiguous, of a chunk and some channels, from the states that chunks start with."""
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = batch * tl.num_programs(1) + chunk
    channel, state = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    is_channel, is_state = channel < channels, state < num_states
    is_pair, pair = is_channel[:, None] & is_state[None, :], channel[:, None] * num_states + state[None, :]
    decay = tl.load(matrix_a + pair, mask=is_pair, other=0.0)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0)
    straight = tl.load(skip + channel, mask=is_channel, other=0.0)
    current = tl.load(starts + index * channels * num_states + pair, mask=is_pair, other=0.0)
    step = tl.arange(0, TILE)
    is_first, is_last = (step == 0)[:, None, None], (step == TILE - 1)[:, None, None]
    for begin in range(0, CHUNK, TILE):
        token = chunk * CHUNK + begin + step
        is_token, row = token < length, batch * length + token
        inside, with_state = is_token[:, None] & is_channel[None, :], is_token[:, None] & is_state[None, :]
        d = _softplus(_load_delta(delta, delta_stride, row, channel, inside, shift))
        value = _load(u, u_stride, row, channel, inside)
        b = _load(matrix_b, b_stride, row, state, with_state)
        c = _load(matrix_c, c_stride, row, state, with_state)
        decays = tl.exp(d[:, :, None] * decay[None, :, :])
        added = (d * value)[:, :, None] * b[:, None, :] + tl.where(is_first, decays * current[None, :, :], 0.0)
        states = tl.associative_scan((decays, added), 0, _combine)[1]
        y = tl.sum(states * c[:, None, :], axis=2) + straight[None, :] * value
        if HAS_Z:
            gate = _load(z, z_stride, row, channel, inside)
            y = y * gate * _sigmoid(gate)
        tl.store(output + row[:, None] * channels + channel[None, :], y.to(output.dtype.element_ty), mask=inside)
        current = tl.sum(tl.where(is_last, states, 0.0), axis=0)


@triton.jit
def start_gradients(
    delta, matrix_a, matrix_c, z, bias, upstream, gradients, length, channels, num_states, delta_stride, c_stride,
    z_stride, upstream_stride,
    HAS_Z: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """A chunk's own part of the gradient [e, n] of the state that it starts with."""
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = batch * tl.num_programs(1) + chunk
    channel, state = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    is_channel, is_state = channel < channels, state < num_states
    is_pair, pair = is_channel[:, None] & is_state[None, :], channel[:, None] * num_states + state[None, :]
    decay = tl.load(matrix_a + pair, mask=is_pair, other=0.0)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0)
    gradient = tl.zeros((CHANNELS, STATES), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    for begin in range(0, CHUNK, TILE):
        token = chunk * CHUNK + begin + tl.arange(0, TILE)
        is_token, row = token < length, batch * length + token
        inside = is_token[:, None] & is_channel[None, :]
        d = _softplus(_load_delta(delta, delta_stride, row, channel, inside, shift))
        so_far = total[None, :] + tl.cumsum(d, axis=0)
        c = _load(matrix_c, c_stride, row, state, is_token[:, None] & is_state[None, :])
        dy = _load(upstream, upstream_stride, row, channel, inside)
        if HAS_Z:
            gate = _load(z, z_stride, row, channel, inside)
            dy = dy * gate * _sigmoid(gate)
        gradient += tl.sum(tl.exp(so_far[:, :, None] * decay[None, :, :]) * dy[:, :, None] * c[:, None, :], axis=0)
        total += tl.sum(d, axis=0)
    tl.store(gradients + index * channels * num_states + pair, gradient, mask=is_pair)


@triton.jit
def backward(
    u, delta, matrix_a, matrix_b, matrix_c, skip, z, bias, upstream, tile_starts, end_gradients, grad_u, grad_delta,
    grad_z, part_a, part_b, part_c, part_skip, part_bias, length, channels, num_states, u_stride, delta_stride,
    b_stride, c_stride, z_stride, upstream_stride,
    HAS_Z: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk and some channels; those of shared arguments are this program's parts of sums.

    tile_starts [b * tiles, e, n]: the states that tiles start with. end_gradients [b * chunks, e, n]: of the states
    that chunks end with, as far as later chunks make them. part_b, part_c [programs over channels, b * s, n], part_a
    [b * chunks, e, n], part_skip and part_bias [b * chunks, e].
    """
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index, num_rows = batch * tl.num_programs(1) + chunk, tl.num_programs(2).to(tl.int64) * length
    channel, state = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    is_channel, is_state = channel < channels, state < num_states
    is_pair, pair = is_channel[:, None] & is_state[None, :], channel[:, None] * num_states + state[None, :]
    decay = tl.load(matrix_a + pair, mask=is_pair, other=0.0)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0)
    straight = tl.load(skip + channel, mask=is_channel, other=0.0)
    above = tl.load(end_gradients + index * channels * num_states + pair, mask=is_pair, other=0.0)
    sum_a = tl.zeros((CHANNELS, STATES), tl.float32)
    sum_skip, sum_bias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    step = tl.arange(0, TILE)
    is_first, is_last = (step == 0)[:, None, None], (step == TILE - 1)[:, None, None]
    for reverse in range(0, CHUNK, TILE):
        begin = CHUNK - TILE - reverse
        token = chunk * CHUNK + begin + step
        is_token, row = token < length, batch * length + token
        inside, with_state = is_token[:, None] & is_channel[None, :], is_token[:, None] & is_state[None, :]
        raw = _load_delta(delta, delta_stride, row, channel, inside, shift)
        d = _softplus(raw)
        value = _load(u, u_stride, row, channel, inside)
        b = _load(matrix_b, b_stride, row, state, with_state)
        c = _load(matrix_c, c_stride, row, state, with_state)
        dy = _load(upstream, upstream_stride, row, channel, inside)
        tile = index * (CHUNK // TILE) + begin // TILE
        current = tl.load(tile_starts + tile * channels * num_states + pair, mask=is_pair, other=0.0)

        decays = tl.exp(d[:, :, None] * decay[None, :, :])
        added = (d * value)[:, :, None] * b[:, None, :]
        folded = added + tl.where(is_first, decays * current[None, :, :], 0.0)
        states = tl.associative_scan((decays, folded), 0, _combine)[1]
        kept = states - added  # exp(d[t] A) h[t-1]
        if HAS_Z:
            y = tl.sum(states * c[:, None, :], axis=2) + straight[None, :] * value
            gate = _load(z, z_stride, row, channel, inside)
            open_ = _sigmoid(gate)
            dz = dy * y * open_ * (1.0 + gate * (1.0 - open_))
            tl.store(grad_z + row[:, None] * channels + channel[None, :], dz.to(grad_z.dtype.element_ty), mask=inside)
            dy = dy * gate * open_
        dc = tl.sum(dy[:, :, None] * states, axis=1)

        has_next = (step < TILE - 1) & (token + 1 < length)
        next_raw = _load_delta(delta, delta_stride, row + 1, channel, has_next[:, None] & is_channel[None, :], shift)
        next_decays = tl.exp(_softplus(next_raw)[:, :, None] * decay[None, :, :])
        own = dy[:, :, None] * c[:, None, :] + tl.where(is_last, above[None, :, :], 0.0)
        gradients = tl.associative_scan((next_decays, own), 0, _combine, reverse=True)[1]
        above = tl.sum(tl.where(is_first, decays * gradients, 0.0), axis=0)

        into = tl.sum(gradients * b[:, None, :], axis=2)
        dd = into * value + tl.sum(gradients * kept * decay[None, :, :], axis=2)
        ddelta = dd * _sigmoid(raw)
        du = dy * straight[None, :] + into * d
        db = tl.sum(gradients * (d * value)[:, :, None], axis=1)
        sum_a += tl.sum(gradients * kept * d[:, :, None], axis=0)
        sum_skip += tl.sum(dy * value, axis=0)
        sum_bias += tl.sum(ddelta, axis=0)
        place = row[:, None] * channels + channel[None, :]
        tl.store(grad_u + place, du.to(grad_u.dtype.element_ty), mask=inside)
        tl.store(grad_delta + place, ddelta.to(grad_delta.dtype.element_ty), mask=inside)
        place = (tl.program_id(0) * num_rows + row)[:, None] * num_states + state[None, :]
        tl.store(part_b + place, db, mask=with_state)
        tl.store(part_c + place, dc, mask=with_state)
    tl.store(part_a + index * channels * num_states + pair, sum_a, mask=is_pair)
    tl.store(part_skip + index * channels + channel, sum_skip, mask=is_channel)
    tl.store(part_bias + index * channels + channel, sum_bias, mask=is_channel)
