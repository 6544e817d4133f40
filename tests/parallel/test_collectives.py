"""The collectives of the tensor axis: autograd's pairs, the vocabulary-parallel loss, and what torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import ShardSpec, get_spec, merge, split
from megatron.parallel.vocab_loss import vocabulary_losses
from tests.ranks import run_ranks

HIDDEN, WIDE, VOCAB, ROWS, LENGTH = 6, 10, 24, 3, 8


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


class Layer(nn.Module):
    """Embedding, a norm, and two split matrices with biases around a tanh: one of each kind of parameter."""

    def __init__(self, region: TensorRegion) -> None:
        super().__init__()
        self.region = region
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, region, drawn)
        self.gain = nn.Parameter(torch.ones(HIDDEN))
        self.first = ColumnParallelLinear(HIDDEN, WIDE, region, drawn, bias=True)
        self.second = RowParallelLinear(WIDE, HIDDEN, region, drawn, bias=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.gain
        return hidden + self.region.leave(self.second(torch.tanh(self.first(self.region.enter(hidden)))))


def fill(layer: nn.Module, axis: Axis) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        spec, shape = get_spec(parameter), list(parameter.shape)
        if spec.dim is not None:
            shape[spec.dim] *= axis.size
        full = torch.randn(shape, generator=generator)
        parameter.data.copy_(split(full, spec, axis.size, axis.rank))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    return tokens, torch.randn((ROWS, LENGTH, HIDDEN), generator=generator)


def run_layer(sequence: bool, compiled: bool) -> tuple[Tensor, dict[str, tuple[ShardSpec, Tensor]]]:
    axis = Mesh.create(tp=torch.distributed.get_world_size()).tp
    region = TensorRegion(axis, sequence)
    layer = Layer(region)
    fill(layer, axis)
    call: Callable[..., Any] = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    tokens, weights = inputs()
    output = call(tokens)
    (output * region.tokens(weights.movedim(1, -1)).movedim(-1, 1)).sum().backward()
    return output.detach(), {name: (get_spec(p), p.grad) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_a_split_layer_equals_the_whole_one(sequence: bool, compiled: bool) -> None:
    ((output, gradients),) = run_ranks(1, run_layer, False, False)
    ranks = run_ranks(2, run_layer, sequence, compiled, timeout=120)
    found = torch.cat([rank[0] for rank in ranks], dim=1) if sequence else ranks[0][0]
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    for name, (spec, gradient) in gradients.items():
        shares = [rank[1][name][1] for rank in ranks]
        if sequence and name == "gain":  # partial: each rank has seen its own tokens only
            shares = [shares[0] + shares[1]]
        torch.testing.assert_close(merge(shares, spec), gradient, rtol=1e-5, atol=1e-5, msg=name)


def run_loss(dtype: torch.dtype, per_token: bool, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    axis = Mesh.create(tp=torch.distributed.get_world_size()).tp
    region = TensorRegion(axis)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn((ROWS, LENGTH, HIDDEN), generator=generator).to(dtype).requires_grad_()
    weight = (logit_scale * torch.randn((VOCAB, HIDDEN), generator=generator)).to(dtype)
    weight = split(weight, ShardSpec(0), axis.size, axis.rank).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.rand((ROWS, LENGTH), generator=generator)
    if per_token:
        losses = linear_cross_entropy(region.enter(hidden), weight, labels, vocabulary_losses(region))
        (losses * mask).sum().backward()
    else:
        losses = linear_cross_entropy_sum(region.enter(hidden), weight, labels, mask, vocabulary_losses(region))
        (2 * losses).backward()
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("logit_scale", [1.0, 200.0])
@pytest.mark.parametrize("per_token", [False, True], ids=["sum", "per token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_of_a_split_vocabulary(
    dtype: torch.dtype, tolerance: float, per_token: bool, logit_scale: float, size: int
) -> None:
    ((losses, hidden, weight),) = run_ranks(1, run_loss, dtype, per_token, logit_scale)
    ranks = run_ranks(size, run_loss, dtype, per_token, logit_scale)
    for found in ranks:
        assert torch.equal(found[0], ranks[0][0])
        assert torch.equal(found[1], ranks[0][1])
    torch.testing.assert_close(ranks[0][0], losses, rtol=tolerance, atol=tolerance)
    assert (ranks[0][1].float() - hidden.float()).norm() <= tolerance * hidden.float().norm()
    shares = torch.cat([rank[2] for rank in ranks])
    assert (shares.float() - weight.float()).norm() <= tolerance * weight.float().norm()


def gathered(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    axis = Mesh.create(tp=2).tp
    whole = torch.arange(2.0 * torch.Size(shape).numel()).view(*shape[:-1], 2 * shape[-1])
    share = whole.chunk(2, dim=-1)[axis.rank].clone().requires_grad_()
    result = TensorRegion(axis).gather_features(share)
    (result * whole).sum().backward()
    assert torch.equal(result.detach(), whole)
    return share.grad, whole.chunk(2, dim=-1)[axis.rank]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_logits_are_gathered_in_order(shape: tuple[int, ...]) -> None:
    for gradient, expected in run_ranks(2, gathered, shape):
        assert torch.equal(gradient, expected)


def uneven() -> str:
    region = TensorRegion(Mesh.create(tp=2).tp, sequence=True)
    try:
        region.leave(torch.ones(1, 3, 2))
    except ValueError as error:
        return str(error)
    return ""


def test_tokens_that_do_not_split_are_refused() -> None:
    assert run_ranks(2, uneven) == ["3 tokens do not split over 2 ranks (sequence_parallel)"] * 2
