"""Vocabulary projection and cross entropy in one, without ever holding all logits.

    logits = x W^T;   loss = logsumexp(logits) - logits[label];   d loss / d logits = softmax(logits) - onehot(label)

The tokens are taken in chunks: the logits of a chunk, in the input's dtype, become fp32 losses and, in the same
memory, their own gradient. `linear_cross_entropy_sum` makes the gradients of x and W without computing logits again,
because the loss of a language model is one weighted sum: in the forward pass up to the factor that is still to come,
or, where W's is one product, when that is known. `linear_cross_entropy` returns each
token's loss, whose gradient is not known in advance, and computes the logits again in the backward pass.

A token's weight scales its row of x, never its row of logits, which is a hundred times longer.

Where W holds a share of the vocabulary only, the caller gives another function for the losses of a block of logits
(`megatron.parallel.vocab_loss`); everything else is the same, and the gradient of x is then the share's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.linear import accumulate_product, accumulates, product_into

CHUNK_BYTES = 104 * 2**20
"""Bytes of a chunk's logits on a CPU: with fewer, the fp32 gradient of W is read and written too often. A CPU has the
memory, and less speed to read it with: there an fp32 chunk has as many tokens as one of bf16."""

CUDA_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU. Reading and writing the fp32 gradient of W takes 233 / (a chunk's tokens) of the time of the
chunk's products, at 4 TB/s and 700 TFLOP/s: 4 % with the 5336 tokens of a vocabulary of 50304 in bf16."""

BLOCK_BYTES = 6 * 2**20
"""Bytes of fp32 logits that are turned into gradients at once on a CPU, so that they stay in its cache."""

FP16_SCALE = 1024.0
"""A softmax over a large vocabulary is below the least normal fp16 number, so fp16 gradients are kept times this."""


BlockLosses = Callable[[Tensor, Tensor, float | None], Tensor]
"""(logits [r, v], labels [r], scale) -> losses [r] fp32. With a scale, the logits become their own gradients times it;
without, they are lost."""


def block_losses(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
    """The BlockLosses of a whole vocabulary."""
    values = logits.float()
    index = labels.unsqueeze(1)
    target = values.gather(1, index)
    maximum = values.amax(dim=1, keepdim=True)
    probabilities = torch.softmax(values, dim=1, out=values)
    # The largest probability is at least 1/v, so its logarithm is exact where the target's own may have underflowed.
    losses = maximum - probabilities.amax(dim=1, keepdim=True).log() - target
    if scale is not None:
        probabilities.scatter_add_(1, index, torch.full_like(target, -1.0))
        logits.copy_(probabilities if scale == 1.0 else probabilities.mul_(scale))
    return losses.squeeze(1)


def losses_in_blocks(
    logits: Tensor, labels: Tensor, scale: float | None, losses_of: BlockLosses, losses: Tensor
) -> None:
    """Fill `losses` [r] fp32 and turn logits [r, v] into their gradients, in blocks that stay in a CPU's cache."""
    for block in _blocks(logits):
        losses[block] = losses_of(logits[block], labels[block], scale)


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, losses: BlockLosses = block_losses
) -> Tensor:
    """Return sum(loss * loss_mask) over all tokens, an fp32 scalar in nats.

    hidden [..., h], weight [v, h], labels [...] int64 in [0, v), loss_mask [...].
    """
    result: Tensor = _WeightedSum.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), loss_mask.flatten().float(), losses, torch.is_grad_enabled()
    )
    return result


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, losses: BlockLosses = block_losses) -> Tensor:
    """Return each token's loss [...] fp32 in nats; hidden [..., h], weight [v, h], labels [...] int64 in [0, v)."""
    per_token: Tensor = _PerToken.apply(hidden.flatten(0, -2), weight, labels.flatten(), losses)
    return per_token.view(labels.shape)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The formula of `linear_cross_entropy`, with all logits in fp32."""
    logits = F.linear(hidden, weight).float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class _WeightedSum(torch.autograd.Function):
    """sum(mask * loss), whose gradients come from the forward pass's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        losses: BlockLosses,
        with_gradient: bool,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden, weight, *needs) if with_gradient and any(needs) else None
        per_token = _walk(hidden, weight, labels, loss_mask, losses, gradients)
        ctx.gradients = gradients
        return torch.dot(per_token, loss_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were handed out and are gone: compute it again")
        return *gradients.finish(upstream[0]), None, None, None, None


class _PerToken(torch.autograd.Function):
    """Each token's loss; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, losses: BlockLosses) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.losses = losses
        return _walk(hidden, weight, labels, torch.ones_like(labels, dtype=torch.float32), losses, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        largest = upstream[0].abs().max().clamp(min=1e-30)  # so that no factor leaves the range of fp16
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        _walk(hidden, weight, labels, upstream[0] / largest, ctx.losses, gradients)
        return *gradients.finish(largest), None, None


class _Gradients:
    """The gradients of x [t, h] and W [v, h], or of the one that needs it, filled chunk by chunk, times `scale`.

    That of a single chunk's W is left until the factor from above is known, which then costs no pass over it. That of
    several chunks is summed in fp32. In fp16 it is fp32 from the first product on: the many gradients of a frequent
    label add up beyond fp16's range before any factor makes them small.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        self.scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        self._hidden = torch.empty_like(hidden) if needs_hidden else None
        self._needs_weight = needs_weight
        self._parameter = weight
        is_one = len(hidden) <= _size(hidden, weight) and weight.dtype == hidden.dtype != torch.float16
        self._chunk: tuple[Tensor, Tensor, Tensor] | None = None  # what a single one's gradient of W is made of
        # Room for it before there are logits, which go first, so that malloc is left with no hole between both.
        self._room = torch.empty_like(weight) if is_one and needs_weight else None
        self._sum = None if is_one or not needs_weight else torch.empty_like(weight, dtype=torch.float32)

    def add(self, start: int, logits_gradient: Tensor, hidden: Tensor, weight: Tensor, factors: Tensor) -> None:
        """Take a chunk: gradient of the unweighted losses [c, v], x [c, h] and the weights of its tokens [c] fp32."""
        if self._hidden is not None:
            rows = self._hidden[start : start + len(hidden)]
            product_into(rows, logits_gradient, weight).mul_(factors.unsqueeze(1))
        if self._room is not None:
            self._chunk = logits_gradient, hidden, factors
        elif self._sum is not None:
            _accumulate(self._sum, logits_gradient, _weighted(hidden, factors), is_first=not start)

    def finish(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return both gradients times an fp32 scalar, in the parameters' dtype; None is what nobody needs."""
        factor = factor / self.scale
        weight = self._weight_gradient(factor) if self._needs_weight else None
        return None if self._hidden is None else self._hidden.mul_(factor), weight

    def _weight_gradient(self, factor: Tensor) -> Tensor:
        if self._room is not None:
            assert self._chunk is not None
            logits_gradient, hidden, factors = self._chunk
            return accumulate_product(
                self._room, logits_gradient.t(), _weighted(hidden, factors * factor), is_first=True
            )
        assert self._sum is not None
        if self._sum.dtype == self._parameter.dtype:
            return self._sum.mul_(factor)
        weight = torch.empty_like(self._parameter)
        for block in _blocks(self._sum):
            weight[block] = self._sum[block].mul_(factor)
        return weight


def _weighted(hidden: Tensor, factors: Tensor) -> Tensor:
    return (hidden * factors.unsqueeze(1)).to(hidden.dtype)


def _accumulate(total: Tensor, logits_gradient: Tensor, weighted: Tensor, is_first: bool) -> None:
    """Add logits_gradient^T [v, c] weighted [c, h] to fp32 `total` [v, h], or fill that with it."""
    if total.dtype == weighted.dtype or accumulates(total, logits_gradient.t(), weighted, is_first):
        accumulate_product(total, logits_gradient.t(), weighted, is_first)
    elif weighted.device.type == "cuda" and _sums_in_fp32(weighted.dtype):
        settings: dict[str, Any] = {"out_dtype": torch.float32, "beta": 0 if is_first else 1, "out": total}
        torch.addmm(total, logits_gradient.t(), weighted, **settings)
    else:
        for block in _blocks(total):
            part = _product(logits_gradient[:, block].t(), weighted)
            total[block] = part if is_first else total[block] + part


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the dtype of both, and of fp16 in fp32."""
    if left.dtype != torch.float16:
        return torch.mm(left, right)
    return torch.mm(left.float(), right.float())


def _walk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor,
    losses_of: BlockLosses,
    gradients: _Gradients | None,
) -> Tensor:
    """Return the losses [t] fp32, chunk by chunk; `gradients`, where given, takes each chunk's part."""
    size = _size(hidden, weight)
    buffer = hidden.new_empty(size, len(weight))
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), size):
        rows = hidden[start : start + size]
        logits = product_into(buffer[: len(rows)], rows, weight.t())
        scale = gradients.scale if gradients else None
        losses_in_blocks(logits, labels[start : start + size], scale, losses_of, losses[start : start + size])
        if gradients is not None:
            gradients.add(start, logits, rows, weight, factors[start : start + size])
    return losses


def _size(hidden: Tensor, weight: Tensor) -> int:
    """Return the tokens of each chunk, which are equal.

    On a CPU one chunk of bf16 logits takes all tokens where that is no more memory than several with their fp32 sum.
    """
    tokens, chunk = len(hidden), _chunk(weight)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        beyond = max(0, tokens - chunk) * weight.element_size() * len(weight)
        chunk = tokens if beyond <= 4 * weight.numel() else chunk
    return -(-tokens // -(-tokens // chunk))


def _chunk(weight: Tensor) -> int:
    """Return how many tokens' logits make a chunk."""
    if weight.device.type == "cuda":
        return max(1, CUDA_CHUNK_BYTES // (weight.element_size() * len(weight)))
    element = 2 if weight.device.type == "cpu" else weight.element_size()
    return max(1, CHUNK_BYTES // (element * len(weight)))


@cache
def _sums_in_fp32(dtype: torch.dtype) -> bool:
    """Return whether this PyTorch adds products of a half precision, unrounded, to an fp32 matrix on a GPU."""
    ones = torch.ones((16, 16), dtype=dtype, device="cuda")
    total = torch.ones((16, 16), device="cuda")
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def _blocks(matrix: Tensor) -> list[slice]:
    """Return slices of the rows, of BLOCK_BYTES of fp32 each on a CPU; elsewhere one slice of all."""
    size = max(1, BLOCK_BYTES // (4 * matrix.shape[1])) if matrix.device.type == "cpu" else len(matrix)
    return [slice(start, start + size) for start in range(0, len(matrix), size)]
