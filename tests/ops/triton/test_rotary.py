"""The kernels turn packed queries and keys as the formula does, and their gradients back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops import rotary as formulae
from megatron.ops.triton import rotary
from tests.ops.triton.agree import DTYPES, check, draw, scattered
from tests.ops.triton.poison import poisoned

# key-value heads, query heads of each, features, features that turn
SHAPES = [(3, 1, 16, 16), (3, 1, 12, 6), (2, 3, 8, 8), (2, 2, 10, 4)]
LENGTH = 5


def tables(turned: int, device: torch.device, batch: int = 0) -> tuple[Tensor, Tensor]:
    """Tables [s, 1, 1, r/2] of all rows, or with a batch tables [b, s, 1, 1, r/2] that differ."""
    positions = torch.arange(LENGTH, device=device)
    if batch:
        positions = (positions - torch.arange(batch, device=device).unsqueeze(1)).clamp(min=0)
    cos, sin = formulae.rotary_tables(positions, turned, 100.0)
    return cos[..., None, None, :], sin[..., None, None, :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 2])
def test_rotate_packed(shape: tuple[int, int, int, int], dtype: torch.dtype, batch: int, device: torch.device) -> None:
    heads, group, features, turned = shape
    cos, sin = tables(turned, device, batch)
    (packed,) = draw(device, dtype, (2, LENGTH, heads, group + 2, features))
    apart = packed.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for memory in (packed, scattered(packed), apart):
        check(
            lambda x: rotary.rotate_packed(x + 0.0, cos, sin),
            lambda x: formulae.rotate_packed(x, cos.double(), sin.double()),
            [memory],
        )


def test_one_query_to_a_key_is_turned_where_it_lies(device: torch.device) -> None:
    (packed,) = draw(device, torch.float32, (2, LENGTH, 3, 3, 8))
    memory = packed.detach().clone()
    query, key, value = rotary.rotate_packed(memory, *tables(8, device))
    assert {query.untyped_storage().data_ptr(), key.untyped_storage().data_ptr()} == {memory.data_ptr()}
    assert torch.equal(value, packed[:, :, :, 2])


def test_nothing_beyond_the_heads_is_touched(device: torch.device) -> None:
    heads, group, features, turned = 3, 2, 7, 6
    packed = torch.full((2, LENGTH, heads, group + 2, features), 2.0, device=device)
    around = torch.full((packed.numel() + 8,), -7.0, device=device)  # guards before and after
    around[4:-4] = packed.flatten()
    inside = around[4:-4].view(packed.shape)
    with poisoned():
        query, key, value = rotary.rotate_packed(inside, *tables(turned, device))
    assert (around[:4] == -7).all()
    assert (around[-4:] == -7).all()
    torch.testing.assert_close((query, key, value), formulae.rotate_packed(packed, *tables(turned, device)))


def test_through_a_linear_map_as_the_model_does(device: torch.device) -> None:
    """The map's output is turned in place, and its gradients are those of the formula."""
    inputs, weight, bias = draw(device, torch.float32, (2, LENGTH, 6), (24, 6), (24,))
    found = []
    for function in (rotary.rotate_packed, formulae.rotate_packed):
        packed = torch.nn.functional.linear(inputs, weight, bias).view(2, LENGTH, 2, 3, 4)
        query, key, value = function(packed, *tables(2, device))
        scores = torch.einsum("bqnd,bknd->bnqk", query, key).tanh()
        output = torch.einsum("bnqk,bknd->bqnd", scores, value)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [inputs, weight, bias])])
    torch.testing.assert_close(*found)


def test_operators(device: torch.device) -> None:
    cos, sin = (table.flatten(0, -2) for table in tables(4, device))
    (packed,) = (each.detach() for each in draw(device, torch.float32, (2, LENGTH, 2, 4, 6)))
    torch.library.opcheck(torch.ops.deepy.rotate_forward.default, (packed, cos, sin))
    query, key, value = formulae.rotate_packed(packed, cos[:, None, None], sin[:, None, None])
    torch.library.opcheck(torch.ops.deepy.rotate_backward.default, (query, key, value, cos, sin))


@pytest.mark.parametrize("group", [1, 2])
def test_compiled_without_a_break_in_the_graph(group: int, device: torch.device) -> None:
    (inputs,) = draw(device, torch.float32, (2, LENGTH, 2, group + 2, 4))

    def function(inputs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = rotary.rotate_packed(inputs * 2, cos, sin)
        return (query.sin().sum() + key.cos().sum()) * value.exp().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    arguments = (inputs, *tables(4, device))
    found = [torch.autograd.grad(each(*arguments), inputs) for each in (compiled, function)]
    torch.testing.assert_close(*found)
