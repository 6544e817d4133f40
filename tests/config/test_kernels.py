"""The keys that choose kernels: GPT-NeoX's true and false, auto, and names; anything else is explained."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.resolve import resolve
from megatron.errors import ConfigError
from tests.model.models import SMALL


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("auto", "auto"),
        ("AUTO", "auto"),
        (True, True),
        (False, False),
        ("true", True),
        ("apex", "apex"),
        (None, "auto"),
    ],
)
def test_values(value: Any, meaning: Any) -> None:
    found = resolve({**SMALL, "layernorm_fusion": value}).kernels.layernorm_fusion
    assert found == meaning
    assert isinstance(found, bool) == isinstance(meaning, bool)


def test_all_are_auto_where_nothing_is_said() -> None:
    assert set(resolve(SMALL).kernels.model_dump().values()) == {"auto"}


def test_what_is_none_of_them() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**SMALL, "rope_fusion": "apex", "rmsnorm_fusion": 2})
    message = str(caught.value)
    assert 'rope_fusion = "apex"' in message
    assert "it is none of auto, true, false, triton" in message
    assert "rmsnorm_fusion = 2" in message


def test_the_swiglu_of_gpt_neox_is_an_activation() -> None:
    assert resolve({**SMALL, "use_flashattn_swiglu": True}).kernels.activation_fusion is True


def test_bias_gelu_fusion_chooses_the_formula_and_not_the_kernel() -> None:
    config = resolve({**SMALL, "activation": "gelu", "bias_gelu_fusion": True})
    assert config.kernels.activation_fusion == "auto"
    assert config.numerics.bias_gelu_fusion
