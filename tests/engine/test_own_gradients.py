"""One micro-batch on one process needs no buffer of gradients: its step is that of the buffer, to the last bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.engine.local import LocalEngine
from megatron.engine.memory import held
from megatron.ops import adamw
from megatron.ops.choice import Choices
from tests.ranks import preload

preload()
from tests.engine import tiny  # noqa: E402

FORMULAE = {"adamw_update_": adamw.adamw_update_reference_, "sum_of_squares": adamw.sum_of_squares}
OVERFLOWS = {"precision": "fp16", "fp16": {"initial_scale_power": 22, "hysteresis": 1}, "gradient_clipping": 1.0}


def _train(buffered: bool, steps: int, ops: str = "", **keys: Any) -> tuple[list[Any], dict[Any, Tensor], list[Any]]:
    """Return results, state and shown gradients. ops: "formula" for the plain twins of the kernels."""
    config = tiny.config(1, **keys)
    with pytest.MonkeyPatch.context() as patch:
        if buffered:
            patch.setattr(LocalEngine, "_is_direct", lambda self: False)
        if ops == "formula":
            patch.setattr(Choices, "get", lambda self, operation, otherwise: FORMULAE[operation])
        engine = tiny.make_engine(config)
    assert (engine._gradients is not None) == buffered
    shown: list[Any] = []
    engine.watch_gradients(lambda name, gradient: shown.append((name, gradient.clone())))
    results = tiny.train(engine, config, 0, steps)
    return results, tiny.merge([tiny.full_state(engine)]), shown


@pytest.mark.parametrize(
    ("keys", "ops", "steps"),
    [
        ({"precision": "bf16"}, "", 5),
        ({"precision": "bf16"}, "formula", 3),
        ({"precision": "bf16", "moments_dtype": "bf16"}, "", 3),
        ({"precision": "fp32"}, "", 3),
        ({"precision": "fp32", "gradient_accumulation_steps": 2}, "", 3),
        (OVERFLOWS, "", 12),
    ],
)
def test_steps_without_a_buffer_are_those_with_one(keys: dict[str, Any], ops: str, steps: int) -> None:
    own, buffered = (_train(way, steps, ops, **keys) for way in (False, True))
    assert [repr(result) for result in own[0]] == [repr(result) for result in buffered[0]]  # nan equals nan
    assert own[1].keys() == buffered[1].keys()
    for key, tensor in buffered[1].items():
        assert torch.equal(own[1][key], tensor), key
    assert dict(own[2]).keys() == dict(buffered[2]).keys()
    theirs = sorted(buffered[2], key=lambda item: item[0])
    for (name, gradient), (_, other) in zip(sorted(own[2], key=lambda item: item[0]), theirs, strict=True):
        assert torch.equal(gradient.nan_to_num(), other.nan_to_num()), name
    if keys is OVERFLOWS:
        assert {result.skipped for result in own[0]} == {True, False}
    else:
        assert any(result.grad_norm > 0.3 for result in own[0]), "nothing was clipped"


def test_a_weight_without_a_gradient_decays_as_with_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(self: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        return torch.nn.functional.cross_entropy(self.head(hidden).float().transpose(1, 2), labels, reduction="none")

    monkeypatch.setattr(tiny.TinyModel, "forward", unused)
    own, buffered = (_train(way, 2, precision="bf16")[1] for way in (False, True))
    for key, tensor in buffered.items():
        assert torch.equal(own[key], tensor), key


@pytest.mark.parametrize(
    "keys", [{"gradient_accumulation_steps": 2}, {"optimizer": {"type": "lion", "params": {"lr": 1e-3}}}]
)
def test_what_needs_a_sum_in_fp32_has_a_buffer(keys: dict[str, Any]) -> None:
    assert tiny.make_engine(tiny.config(1, precision="bf16", **keys))._gradients is not None


def test_gradients_are_halves_and_there_only_from_the_backward_pass_to_the_update() -> None:
    config = tiny.config(1, precision="bf16")
    engine = tiny.make_engine(config)
    numel = sum(parameter.numel() for parameter in engine.model.parameters())
    seen = []

    def noted(call: Any, *arguments: Any) -> Any:
        before = held(engine, torch.device("cpu")).gradients
        result = call(*arguments)
        seen.append((before, held(engine, torch.device("cpu")).gradients))
        return result

    engine._backward = partial(noted, engine._backward)
    engine._update = partial(noted, engine._update)
    tiny.train(engine, config, 0, 2)
    assert seen == [(0, 2 * numel), (2 * numel, 0)] * 2
