from __future__ import annotations

import pytest
import torch

from megatron.config.schema.model import GATED_ACTIVATIONS
from megatron.ops.activations import GATES, PLAIN, make_activation, reference


@pytest.mark.parametrize("name", [*PLAIN, *GATES])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_activations_equal_their_formulas(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    inputs = (3 * torch.randn(4, 10)).to(dtype).requires_grad_()
    copied = inputs.detach().float().requires_grad_()
    output, expected = make_activation(name)(inputs), reference(name, copied)
    assert output.shape[-1] == (5 if name in GATES else 10)
    output.float().square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inputs.grad.float(), copied.grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_bias_gelu_fusion_means_the_tanh_form() -> None:
    inputs = torch.linspace(-4, 4, 101)
    tanh = make_activation("gelu", tanh_gelu=True)(inputs)
    torch.testing.assert_close(tanh, reference("gelu", inputs, tanh_gelu=True))
    assert (tanh - make_activation("gelu")(inputs)).abs().max() > 1e-4
    assert make_activation("relu", tanh_gelu=True) is make_activation("relu")


def test_names_are_those_of_the_config() -> None:
    assert set(GATES) == set(GATED_ACTIVATIONS)
