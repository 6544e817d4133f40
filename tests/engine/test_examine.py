"""A step that is not finite is done again, and the layer where it begins is named: in every layout, on one rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron.engine.build import build_engine
from megatron.engine.examination import Examination
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.engine import tiny
from tests.parallel import matrix
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "zero 0": {"train_micro_batch_size_per_gpu": 2},
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2, "precision": "bf16"},
    "zero 3": {"stage": 3},
    "tensor": {"model_parallel_size": 2},
    "pipeline": {"pipe_parallel_size": 2, "train_micro_batch_size_per_gpu": 2},
    "recomputed": {"checkpoint_activations": True, "precision": "bf16"},
    "optimizer in backward": {"optimizer_in_backward": True, "gradient_clipping": 0.0},
}
MODULE = "layers.1.mlp.linear1"
NAN = float("nan")


def build(keys: dict[str, Any], world_size: int) -> tuple[Any, list[Any]]:
    config = matrix.make_config(keys, world_size)
    mesh = matrix.make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())
    return engine, [matrix.micro_batches(config, batch, mesh) for batch in matrix.make_batches(config)]


Removable = torch.utils.hooks.RemovableHandle


def break_weight(engine: Any) -> None:
    """For ever."""
    fragments = [each for each in engine._holdings().held if each.name == f"{MODULE}.weight"]
    for fragment in fragments:
        fragment.weight[:1] = fragment.master[:1] = NAN


def break_activation(engine: Any) -> Removable | None:
    """In the micro-batches of this rank, the input of the module is spoilt."""
    if MODULE not in dict(engine.model.named_modules()):
        return None
    module = engine.model.get_submodule(MODULE)
    return module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * NAN, *inputs[1:]))


def break_gradient(engine: Any) -> Removable | None:
    """The backward pass makes inf of a finite gradient at the output of the module."""
    if MODULE not in dict(engine.model.named_modules()):
        return None

    def spoil(_module: Any, _inputs: Any, outputs: Any) -> Any:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        spoilt = first + 0.0
        spoilt.register_hook(lambda gradient: gradient * math.inf)
        return (spoilt, *outputs[1:]) if isinstance(outputs, tuple) else spoilt

    return engine.model.get_submodule(MODULE).register_forward_hook(spoil)


BREAKS: dict[str, Any] = {"activation": break_activation, "gradient": break_gradient, "parameter": break_weight}


def examined(layout: str) -> tuple[list[dict[str, tuple[Examination, bool]]], int]:
    """Return of each rank, for each kind, (examination, nothing has changed), and the rank that was broken."""
    world_size = 1 if layout in ("one rank", "recomputed", "optimizer in backward") else 2
    broken = world_size - 1

    def run() -> dict[str, tuple[Examination, bool]]:
        engine, batches = build(LAYOUTS[layout], world_size)
        engine.train_step(batches[0], 0)
        found = {}
        for kind, spoil in BREAKS.items():
            handle = spoil(engine) if engine._mesh.world.rank == broken else None
            start = tiny.full_state(engine)
            examination = engine.examine(batches[1], 1)
            pairs = zip(start, tiny.full_state(engine), strict=True)
            found[kind] = examination, all(torch.equal(a[-1].nan_to_num(), b[-1].nan_to_num()) for a, b in pairs)
            if handle is not None:
                handle.remove()
        return found

    return run_ranks(world_size, run), broken


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layer_is_named(layout: str) -> None:
    ranks, broken = examined(layout)
    for kind, (examination, unchanged) in (item for rank in ranks for item in rank.items()):
        assert unchanged
        cause = examination.cause
        assert cause is not None
        assert (cause.kind, cause.layer, cause.rank) == (kind, "layers.1", broken)
        if kind == "parameter":
            assert cause.place == f"{MODULE}.weight"
            assert examination.bad_weights == [cause.place]
        elif kind == "activation":
            assert (cause.place, cause.micro_batch) == (f"input of {MODULE}", 0)
        else:
            assert cause.place.startswith((MODULE, "layers.1."))
            assert "layers.0.mlp.linear2.weight" in examination.bad_gradients
            assert math.isfinite(examination.norms["final_norm"])
        assert not math.isfinite(examination.norms["layers.0"])
        assert list(examination.norms) == ["embedding", "layers.0", "layers.1", "final_norm", "head"]


@pytest.mark.parametrize("layout", ["zero 0", "tensor", "pipeline", "zero 3", "context"])
def test_a_step_without_fault_has_no_cause_and_the_numbers_of_a_step(layout: str) -> None:
    keys = {**LAYOUTS, "context": {"context_parallel_size": 2}}[layout]

    def run() -> tuple[Any, Any, bool]:
        engine, batches = build(keys, 2)
        examination = engine.examine(batches[0], 0)
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules())
        result = engine.train_step(batches[0], 0)
        engine.examine(batches[1], 1)
        return (
            examination,
            result,
            hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()),
        )

    for examination, result, hooks_are_gone in run_ranks(2, run):
        assert hooks_are_gone
        assert examination.cause is None
        norm = math.sqrt(sum(norm**2 for norm in examination.norms.values()))
        assert norm == pytest.approx(result.grad_norm, rel=1e-5)
        total = sum(each.loss * each.num_tokens for each in examination.micro_batches)
        assert sum(each.num_tokens for each in examination.micro_batches) == result.num_tokens
        assert total / result.num_tokens == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.parametrize("keys", [{"pos_emb": "alibi"}, {"pos_emb": "rpe"}, {"norm": "rmsnorm", "pos_emb": "learned"}])
def test_what_a_sound_model_computes_is_finite(keys: dict[str, Any]) -> None:
    def run() -> Examination:
        engine, batches = build(keys, 1)
        return engine.examine(batches[0], 0)

    assert run_ranks(1, run)[0].cause is None


def test_examining_leaves_the_fp16_loss_scale_alone() -> None:
    def run() -> tuple[float, float]:
        engine, batches = build({"precision": "fp16", "fp16": {"hysteresis": 1}}, 1)
        break_activation(engine)
        before = float(engine._scaler.cur_scale)
        engine.examine(batches[0], 0)
        return before, float(engine._scaler.cur_scale)

    before, after = run_ranks(1, run)[0]
    assert before == after
