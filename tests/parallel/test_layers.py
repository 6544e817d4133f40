"""On an axis of size 1 the parallel layers are the plain formulas, with their ShardSpec attached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    get_initializer,
    make_parameter,
    ones,
    zeros,
)
from megatron.parallel.mesh import Axis
from megatron.parallel.sharding import ShardSpec, get_spec, split

ONE = TensorRegion(Axis("tp"))


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_equal_torch(kind: type[nn.Module], bias: bool) -> None:
    layer = kind(5, 6, ONE, drawn, bias)
    fill(layer)
    plain = nn.Linear(5, 6, bias=bias)
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(2, 3, 5, requires_grad=True)
    copied = inputs.detach().clone().requires_grad_()
    outputs, expected = layer(inputs), plain(copied)
    torch.testing.assert_close(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(inputs.grad, copied.grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad)


def test_embedding_looks_rows_up() -> None:
    layer = VocabParallelEmbedding(7, 4, ONE, drawn)
    fill(layer)
    tokens = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(layer(tokens), layer.weight[tokens])


def test_each_parameter_knows_how_it_is_split() -> None:
    column = ColumnParallelLinear(4, 8, ONE, drawn, bias=True, blocks=2)
    row = RowParallelLinear(8, 4, ONE, drawn, bias=True)
    assert get_spec(column.weight) == ShardSpec(0, blocks=2)
    assert get_spec(column.bias) == ShardSpec(0, blocks=2)
    assert get_spec(row.weight) == ShardSpec(1)
    assert get_spec(row.bias) == ShardSpec()
    assert get_spec(VocabParallelEmbedding(8, 4, ONE, drawn).weight) == ShardSpec(0)


def test_shares_of_the_columns_and_rows_add_up() -> None:
    """What collectives will join: concatenated column outputs, summed row outputs."""
    weight, inputs = torch.randn(6, 4), torch.randn(3, 4)
    column = torch.cat([inputs @ split(weight, ShardSpec(0), 2, rank).T for rank in (0, 1)], dim=-1)
    torch.testing.assert_close(column, inputs @ weight.T)
    row = sum(split(inputs, ShardSpec(1), 2, rank) @ split(weight, ShardSpec(1), 2, rank).T for rank in (0, 1))
    torch.testing.assert_close(row, inputs @ weight.T)


def test_a_parameter_holds_its_share_and_its_initializer() -> None:
    parameter = make_parameter((8, 3), ShardSpec(0), Axis("tp", 4, 1), ones)
    assert parameter.shape == (2, 3)
    assert get_initializer(parameter) is ones
    generator = torch.Generator()
    assert torch.equal(ones((2,), generator), torch.ones(2))
    assert torch.equal(zeros((2,), generator), torch.zeros(2))
