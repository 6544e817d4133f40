"""The adapter of Transformer Engine's linear layer, on a stand-in with its signatures (version 2.9) and its recipe.

The stand-in computes the formula of `Float8CurrentScaling` within an `autocast` that is given that recipe; like the
library it refuses rows that are no multiple of 16, and weights on the meta device.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.ops import choice, fp8
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Candidate, Situation

active: list[Any] = []


class Float8CurrentScaling:
    pass


@contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Any = None, amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:  # fmt: skip
    active.append(recipe if enabled else None)
    yield
    active.pop()


class Linear(nn.Module):
    made = 0

    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Any = None, init_method: Any = None, bias: bool = True, return_bias: bool = False,
        params_dtype: torch.dtype | None = None, parallel_mode: str | None = None, parameters_split: Any = None,
        device: torch.device | str = "cuda", **userbuffers: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias
        Linear.made += 1
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor:
        assert not self.weight.is_meta
        assert inp.shape[0] % 16 == 0, "FP8 execution requires multiples"
        assert isinstance(active[-1], Float8CurrentScaling)
        return fp8.float8_linear_reference(inp, self.weight)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in is installed."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common")
    modules = {name: ModuleType(name) for name in (*names, "transformer_engine.common.recipe")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    modules["transformer_engine.pytorch"].__dict__.update(Linear=Linear, autocast=autocast)
    modules["transformer_engine.common.recipe"].__dict__.update(Float8CurrentScaling=Float8CurrentScaling)
    monkeypatch.delitem(sys.modules, "megatron.ops.transformer_engine_linear", raising=False)
    monkeypatch.setattr(Candidate, "obstacle", lambda self, situation: "")
    yield
    sys.modules.pop("megatron.ops.transformer_engine_linear", None)


@pytest.mark.usefixtures("installed")
def test_it_passes_the_probe_and_is_chosen_by_its_name() -> None:
    situation = Situation(torch.device("cpu"), torch.bfloat16, 48)
    (found,) = choice.choose({"float8_linear": "transformer_engine"}, situation, CATALOGUE).choices
    assert (found.candidate, found.refused) == ("transformer_engine", ())
    assert found.function.__module__ == "megatron.ops.transformer_engine_linear"


@pytest.mark.usefixtures("installed")
def test_any_rows_one_module_for_a_shape_and_the_layers_that_do_not_fit() -> None:
    adapter = importlib.import_module("megatron.ops.transformer_engine_linear").float8_linear
    before = Linear.made
    for rows in (16, 5, 32):
        inputs, weight, bias = torch.randn(3, rows, 32), torch.randn(48, 32), torch.randn(48)
        expected = fp8.float8_linear_reference(inputs, weight, bias)
        torch.testing.assert_close(adapter(inputs, weight, bias), expected, rtol=1e-5, atol=1e-5)
    assert Linear.made == before + 1
    odd = torch.randn(48, 33)
    assert torch.equal(adapter(torch.randn(2, 33).fill_(0.5), odd), torch.full((2, 33), 0.5) @ odd.t())
    assert not active
