"""The selective state-space scan of Mamba, cut into chunks that run side by side (Gu & Dao 2023, section 3.3).

    d = softplus(delta + bias)    h[t] = exp(d[t] A) h[t-1] + d[t] u[t] B[t]    y[t] = (C[t] h[t] + D u[t]) silu(z[t])

Over a chunk the state decays by exp(A * sum of d), so what a chunk adds to it needs no recurrence. Three steps: every
chunk's own part of its last state; the states between chunks, one after another; every chunk's outputs from the state
it starts with. The gradient of the state goes the same way backwards. Within a chunk, tiles of a few tokens are
scanned by `tl.associative_scan`, channels and states side by side. States and sums are fp32.

Nothing of size [b, s, e, n] is ever in memory; one state for each chunk is kept for the backward pass, which holds one
for each tile while it runs. Sums over programs are made in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron.ops.triton import scan_kernels as kernels
from megatron.ops.triton.launch import Sample, as_rows, operator, runs, start

CHUNK = 128
"""Tokens of a chunk."""

TILE = 16
"""Tokens that are scanned at once; divides CHUNK."""

CHANNELS = 16
"""Channels of a program."""

NUM_WARPS = 8


@operator()
def selective_scan_forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, z: Tensor | None, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [b, s, e] in u's dtype, the states [b, chunks, e, n] that chunks start with and the sums [b, chunks, e]
    of d, both fp32. u, delta, z [b, s, e]; a [e, n], skip and bias [e] fp32; b, c [b, s, n].
    """
    batch, length, channels = u.shape
    num_states, num_chunks = a.shape[1], triton.cdiv(length, CHUNK)
    output = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
    starts = torch.empty((batch, num_chunks, channels, num_states), dtype=torch.float32, device=u.device)
    sums = torch.empty((batch, num_chunks, channels), dtype=torch.float32, device=u.device)
    if runs(u):
        a, skip, bias = a.contiguous(), skip.contiguous(), bias.contiguous()
        rows_u, rows_delta, rows_b, rows_c = as_rows(u), as_rows(delta), as_rows(b), as_rows(c)
        rows_z = rows_u if z is None else as_rows(z)
        shape = (length, channels, num_states)
        constants = _constants(num_states)
        tiles = {"CHUNK": CHUNK, "TILE": TILE}
        grid = (triton.cdiv(channels, CHANNELS), num_chunks, batch)
        strides = (rows_u.stride(0), rows_delta.stride(0), rows_b.stride(0))
        start(kernels.states, grid, rows_u, rows_delta, a, rows_b, bias, starts, starts, sums, *shape, *strides,
              OF_TILES=False, **tiles, **constants)  # fmt: skip
        start(kernels.between, (grid[0], batch), starts, sums, a, num_chunks, channels, num_states,
              REVERSE=False, **constants)  # fmt: skip
        start(kernels.outputs, grid, rows_u, rows_delta, a, rows_b, rows_c, skip, rows_z, bias, starts, output, *shape,
              *strides, rows_c.stride(0), rows_z.stride(0), HAS_Z=z is not None, **tiles, **constants)  # fmt: skip
    return output, starts, sums


@operator()
def selective_scan_backward(
    upstream: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    z: Tensor | None,
    bias: Tensor,
    starts: Tensor,
    sums: Tensor,
) -> list[Tensor]:
    """Return the gradients of u, delta, a, b, c, skip, z and bias, each of its argument's shape and dtype; without z,
    the seventh is empty. The other arguments are those of the forward operator and what it returned.
    """
    batch, length, channels = u.shape
    num_states, num_chunks, num_blocks = a.shape[1], starts.shape[1], triton.cdiv(channels, CHANNELS)
    single: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    shape = (batch, length, channels)
    grad_u, grad_delta = (torch.empty(shape, dtype=tensor.dtype, device=u.device) for tensor in (u, delta))
    grad_z = torch.empty(shape if z is not None else (0,), dtype=u.dtype if z is None else z.dtype, device=u.device)
    part_a = torch.empty((batch * num_chunks, channels, num_states), **single)
    part_skip, part_bias = (torch.empty((batch * num_chunks, channels), **single) for _ in range(2))
    part_b, part_c = (torch.empty((num_blocks, batch, length, num_states), **single) for _ in range(2))
    if runs(u):
        tile_starts = torch.empty((batch, num_chunks * (CHUNK // TILE), channels, num_states), **single)
        gradients = torch.empty_like(starts)
        a, skip, bias = a.contiguous(), skip.contiguous(), bias.contiguous()
        rows_u, rows_delta, rows_b, rows_c = as_rows(u), as_rows(delta), as_rows(b), as_rows(c)
        rows_z, rows_y = rows_u if z is None else as_rows(z), as_rows(upstream)
        sizes, constants, tiles = (length, channels, num_states), _constants(num_states), {"CHUNK": CHUNK, "TILE": TILE}
        grid = (num_blocks, num_chunks, batch)
        strides = (rows_u.stride(0), rows_delta.stride(0), rows_b.stride(0))
        later_strides = (rows_c.stride(0), rows_z.stride(0), rows_y.stride(0))
        has_z = {"HAS_Z": z is not None}
        start(kernels.states, grid, rows_u, rows_delta, a, rows_b, bias, starts, tile_starts, sums, *sizes, *strides,
              OF_TILES=True, **tiles, **constants)  # fmt: skip
        start(kernels.start_gradients, grid, rows_delta, a, rows_c, rows_z, bias, rows_y, gradients, *sizes,
              rows_delta.stride(0), *later_strides, **has_z, **tiles, **constants)  # fmt: skip
        start(kernels.between, (num_blocks, batch), gradients, sums, a, num_chunks, channels, num_states,
              REVERSE=True, **constants)  # fmt: skip
        start(kernels.backward, grid, rows_u, rows_delta, a, rows_b, rows_c, skip, rows_z, bias, rows_y, tile_starts,
              gradients, grad_u, grad_delta, grad_z, part_a, part_b, part_c, part_skip, part_bias, *sizes, *strides,
              *later_strides, **has_z, **tiles, **constants)  # fmt: skip
    return [
        grad_u,
        grad_delta,
        part_a.sum(0),
        part_b.sum(0).to(b.dtype),
        part_c.sum(0).to(c.dtype),
        part_skip.sum(0),
        grad_z,
        part_bias.sum(0),
    ]


def _constants(num_states: int) -> dict[str, int]:
    return {"CHANNELS": CHANNELS, "STATES": triton.next_power_of_2(num_states), "num_warps": NUM_WARPS}


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor | None) -> Tensor:
        output, starts, sums = selective_scan_forward(*arguments)
        ctx.save_for_backward(*arguments, starts, sums)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = selective_scan_backward(upstream[0], *ctx.saved_tensors)
        return tuple(grad if need else None for grad, need in zip(gradients, ctx.needs_input_grad, strict=True))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`megatron.ops.scan.selective_scan`."""
    zeros = None if skip is not None and bias is not None else a.new_zeros(len(a), dtype=torch.float32)
    skip, bias = zeros if skip is None else skip.float(), zeros if bias is None else bias.float()
    output: Tensor = _SelectiveScan.apply(u, delta, a.float(), b, c, skip, z, bias)
    return output


def samples() -> list[Sample]:
    """Mamba of 1.4B parameters: 4096 channels, 16 states."""
    return [Sample("selective_scan bfloat16", _sample)]


def _sample(device: torch.device) -> None:
    wide: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    u, delta, z = (torch.empty(4, 2048, 4096, **wide) for _ in range(3))
    b, c = (torch.empty(4, 2048, 16, **wide) for _ in range(2))
    a = torch.empty(4096, 16, device=device, requires_grad=True)
    skip, bias = (torch.empty(4096, device=device, requires_grad=True) for _ in range(2))
    output = selective_scan(u, delta, a, b, c, skip, z, bias)
    output.backward(torch.empty_like(output))
