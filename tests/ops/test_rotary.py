from __future__ import annotations

import pytest
import torch

from megatron.ops.rotary import rotary_tables, rotate, rotate_reference


@pytest.mark.parametrize("dim", [2, 6, 10])
def test_rotation_equals_its_formula(dim: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 1000])
    inputs = torch.randn(4, 10, requires_grad=True)
    copied = inputs.detach().clone().requires_grad_()
    output = rotate(inputs, *rotary_tables(positions, dim, base=10000))
    expected = rotate_reference(copied, positions, dim, base=10000)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    output.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(inputs.grad, copied.grad, rtol=1e-4, atol=1e-3)


def test_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(8), torch.randn(8)

    def score(query_at: int, key_at: int) -> float:
        tables = rotary_tables(torch.tensor([query_at, key_at]), 8, base=10000)
        turned = rotate(torch.stack([query, key]), *tables)
        return float(turned[0] @ turned[1])

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-4)


def test_features_beyond_the_rotary_dim_and_dtype_are_kept() -> None:
    inputs = torch.randn(3, 8).bfloat16()
    output = rotate(inputs, *rotary_tables(torch.arange(3), 4, base=10000))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output[:, 4:], inputs[:, 4:])


def test_angles_of_bf16_inputs_are_not_rounded() -> None:
    """In bf16 the position 1001 itself would be 1000."""
    position = torch.tensor([1001])
    turned = rotate(torch.tensor([[1.0, 0.0]]).bfloat16(), *rotary_tables(position, 2, base=10000))
    expected = torch.stack([torch.cos(torch.tensor(1001.0)), torch.sin(torch.tensor(1001.0))])
    torch.testing.assert_close(turned[0].float(), expected, rtol=5e-3, atol=1e-3)
