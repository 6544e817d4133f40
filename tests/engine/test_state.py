"""State out of one engine and into another: bitwise on the same layout, equal across ranks and ZeRO stages."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch

from megatron.config.schema.config import Config
from megatron.errors import CheckpointError
from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402
from tests.engine.sources import Tensors  # noqa: E402

OPTIMIZERS = {
    "adam": {"type": "adam", "params": {"lr": 1e-2}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-1, "momentum": 0.9}},
    "lion": {"type": "Lion", "params": {"lr": 1e-3}},
    "madgrad_wd": {"type": "madgrad_wd", "params": {"lr": 1e-3}},
    "sm3": {"type": "sm3", "params": {"lr": 1e-2, "momentum": 0.9, "beta": 0.9}},
}


def configured(world_size: int, stage: int, precision: str, optimizer="adam") -> Config:
    return tiny.config(
        world_size,
        stage=stage,
        precision=precision,
        gradient_accumulation_steps=4 // world_size,
        optimizer=OPTIMIZERS[optimizer],
        weight_decay=0.0 if optimizer == "sm3" else 0.1,
    )


def run(world_size: int, stage: int, precision: str, steps: tuple[int, ...], saved=None, optimizer="adam") -> tuple:
    """Train from each of `steps` to the next, from `saved` where given.

    Return the results and, at each of `steps`, all that a checkpoint would hold."""
    config = configured(world_size, stage, precision, optimizer)
    model = tiny.TinyModel()
    if saved is not None:  # nothing of the new model may survive
        for parameter in model.parameters():
            parameter.data.fill_(3.0)
    engine = tiny.make_engine(config, model)
    if saved is not None:
        engine.load_state(Tensors(saved), with_optimizer=True)
    results, states = [], [tiny.full_state(engine)]
    for first, last in pairwise(steps):
        results += tiny.train(engine, config, first, last)
        states.append(tiny.full_state(engine))
    return results, states


@functools.cache
def run_from_scratch(world_size: int, stage: int, precision: str, steps: tuple[int, ...], optimizer="adam") -> tuple:
    return run_and_merge(world_size, stage, precision, steps, optimizer=optimizer)


def run_and_merge(*args, **keys) -> tuple:
    """Return rank 0's results, and the merged state at each step."""
    ranks = run_ranks(args[0], lambda: run(*args, **keys))
    return ranks[0][0], [tiny.merge(list(pieces)) for pieces in zip(*(states for _, states in ranks), strict=True)]


def assert_bitwise(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_on_the_same_layout_is_bitwise(stage, precision, world_size):
    through, (_, halfway, end) = run_from_scratch(world_size, stage, precision, (0, 3, 5))
    resumed, (loaded, resumed_end) = run_and_merge(world_size, stage, precision, (3, 5), halfway)
    assert resumed == through[3:]
    assert_bitwise(loaded, halfway)
    assert_bitwise(resumed_end, end)
    kinds = {kind for _, kind in end}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step"} | ({"master"} if precision == "bf16" else set())
    assert {tensor.item() for (_, kind), tensor in end.items() if kind == "step"} == {5.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_layout_continues_any_other(precision):
    layouts = [(1, 1), (2, 0), (2, 2), (1, 3), (2, 1), (1, 0), (2, 3)]
    for number, layout in enumerate(layouts):
        through, (_, halfway, _) = run_from_scratch(*layouts[number - 1], precision, (0, 3, 5))
        resumed, (loaded, _) = run_and_merge(*layout, precision, (3, 5), halfway)
        assert_bitwise(loaded, halfway)
        for ours, theirs in zip(resumed, through[3:], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=2e-6 if precision == "fp32" else 1e-4)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [*((optimizer, stage) for optimizer in ("sgd", "lion", "madgrad_wd") for stage in (0, 1, 3)), ("sm3", 0)],
)
def test_other_optimizers_resume_bitwise(optimizer, stage):
    through, (_, halfway, end) = run_from_scratch(2, stage, "bf16", (0, 2, 4), optimizer)
    resumed, (_, resumed_end) = run_and_merge(2, stage, "bf16", (2, 4), halfway, optimizer)
    assert resumed == through[2:]
    assert_bitwise(resumed_end, end)


@pytest.mark.parametrize("stage", [1, 3])
def test_state_before_the_first_step_is_a_checkpoint_too(stage):
    through, (start, *_) = run_from_scratch(2, stage, "bf16", (0, 3, 5))
    resumed, _ = run_and_merge(2, stage, "bf16", (0, 2), start)
    assert resumed == through[:2]
    assert {tensor.item() for (_, kind), tensor in start.items() if kind == "step"} == {0.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_alone_make_the_masters_and_survive_a_step_of_nothing(stage, precision):
    """The classic accident: random masters overwrite loaded weights in the first step."""
    _, (_, saved, _) = run_from_scratch(1, 1, precision, (0, 3, 5))
    weights = {key: tensor for key, tensor in saved.items() if key[1] == "weight"}

    def fine_tune() -> list:
        config = tiny.config(2, stage=stage, precision=precision, optimizer={"type": "adam", "params": {"lr": 1e-30}})
        engine = tiny.make_engine(config)
        engine.load_state(Tensors(weights), with_optimizer=False)
        tiny.train(engine, config, 0, 1)
        return tiny.full_state(engine)

    state = tiny.merge(run_ranks(2, fine_tune))
    assert_bitwise({key: tensor for key, tensor in state.items() if key[1] == "weight"}, weights)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_that_has_trained_goes_back_to_a_checkpoint_bitwise(stage, precision, world_size):
    """What a rollback does. Weights that ZeRO 3 keeps gathered are none of the steps that are taken back."""
    through, (_, halfway, end) = run_from_scratch(world_size, stage, precision, (0, 3, 5))

    def go_back() -> tuple:
        config = configured(world_size, stage, precision)
        engine = tiny.make_engine(config)
        tiny.train(engine, config, 6, 8)
        engine.evaluate(tiny.micro_batches(config, 8, engine._mesh))
        engine.load_state(Tensors(halfway), with_optimizer=True)
        return tiny.train(engine, config, 3, 5), tiny.full_state(engine)

    ranks = run_ranks(world_size, go_back)
    assert ranks[0][0] == through[3:]
    assert_bitwise(tiny.merge([state for _, state in ranks]), end)


def test_missing_and_misshapen_tensors_are_all_named_on_every_rank():
    _, (saved, *_) = run_from_scratch(1, 1, "fp32", (0, 3, 5))
    saved = dict(saved)
    del saved["head.weight", "weight"]
    saved["up.bias", "weight"] = torch.zeros(5)

    def load() -> str:
        engine = tiny.make_engine(tiny.config(2, stage=1))
        with pytest.raises(CheckpointError) as caught:
            engine.load_state(Tensors(saved), with_optimizer=True)
        return str(caught.value)

    messages = " ".join(run_ranks(2, load))
    assert "head.weight: no weight" in messages
    assert "up.bias (weight) has shape [5] in the checkpoint: this model's is [61]." in messages


def test_a_checkpoint_without_optimizer_state_says_what_to_set():
    _, (saved, *_) = run_from_scratch(1, 1, "fp32", (0, 3, 5))
    weights = {key: tensor for key, tensor in saved.items() if key[1] == "weight"}
    with pytest.raises(CheckpointError, match=r"no exp_avg: .* Set no_load_optim: true"):
        run_and_merge(1, 1, "fp32", (0, 1), weights)
