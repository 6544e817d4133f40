"""The selective state-space scan of Mamba (Gu & Dao 2023, equation 2; B is discretised as d B).

    d[t] = softplus(delta[t] + bias)
    h[t] = exp(d[t] A) h[t-1] + d[t] u[t] B[t],   h[-1] = 0          for each channel, over n states
    y[t] = (C[t] . h[t] + D u[t]) silu(z[t])

All of it in fp32; the outputs have u's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Return y [b, s, e]: the formula, token by token.

    u, delta, z [b, s, e]: inputs, step sizes before the softplus, gates. a [e, n], negative. b, c [b, s, n]: what
    enters the states and what is read from them. skip, the paper's D, and bias of delta: [e].
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs, a, b, c = (tensor.to(dtype) for tensor in (u, a, b, c))
    steps = F.softplus(delta.to(dtype) if bias is None else delta.to(dtype) + bias.to(dtype))
    state = torch.zeros((len(u), *a.shape), dtype=dtype, device=u.device)
    outputs = []
    for token in range(u.shape[1]):
        step = steps[:, token, :, None]
        state = torch.exp(step * a) * state + step * inputs[:, token, :, None] * b[:, token, None, :]
        outputs.append((state * c[:, token, None, :]).sum(-1))
    output = torch.stack(outputs, dim=1)
    output = output if skip is None else output + skip.to(dtype) * inputs
    output = output if z is None else output * F.silu(z.to(dtype))
    return output.to(u.dtype)
