"""ZeRO 3 holds no gathered weight between a layer's forward and backward pass, whatever the blocks are made of.

DeepSpeed keeps weights on purpose that are used again soon: `HELD_NO_LONGER` switches that off, so that what stays is
what something else holds. Two ranks, eager; compiled blocks are counted in test_compile.py.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.ranks import preload, run_ranks

preload()
from megatron.config.schema.config import Config  # noqa: E402
from megatron.engine import through_deepspeed  # noqa: E402
from megatron.engine.build import build_engine  # noqa: E402
from megatron.model import offload  # noqa: E402
from megatron.model.build import build_model  # noqa: E402
from megatron.objectives.build import build_objective  # noqa: E402
from megatron.ops import linear  # noqa: E402
from megatron.planning.layout import Layout  # noqa: E402
from tests.parallel import matrix  # noqa: E402

LAYERS = 3
LAYER, BLOCK = 4 * 32 * 32 + 4 * 32, 12 * 32 * 32 + 13 * 32
"""Elements of the largest layer, and of a block, whose weights are all there while it is computed again."""

PATIENCE = 2.0
"""Seconds until what is still there counts as held."""

HELD_NO_LONGER: dict[str, Any] = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}

NEOX: dict[str, Any] = {"gpt_j_residual": True, "gpt_j_tied": True}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False, "use_bias_in_mlp": False,
}  # fmt: skip
WHOLE = {"checkpoint_activations": True}
OPERATIONS = {**WHOLE, "checkpoint_operations": ["norm", "attention", "activation"]}
TIED = {"no_weight_tying": False, "pos_emb": "learned"}
MODELS: dict[str, dict[str, Any]] = {
    "neox": NEOX,
    "neox, tied, learned positions": {**NEOX, **TIED},
    "neox, recomputed": {**NEOX, **WHOLE},
    "neox, operations": {**NEOX, **OPERATIONS},
    "neox, head norms, rpe, fp8": {"use_qk_layernorm": True, "pos_emb": "rpe", "precision": "fp8"},
    "llama": LLAMA,
    "llama, tied, bf16": {**LLAMA, "no_weight_tying": False, "precision": "bf16"},
    "llama, recomputed": {**LLAMA, **WHOLE},
    "llama, operations, fp8": {**LLAMA, **OPERATIONS, "precision": "fp8"},
    "llama, activations travel": {**LLAMA, "offload_activations": True},
}


class Gathered:
    """Elements of gathered weights that are in memory, known by the storages that layers' forward passes found."""

    def __init__(self, model: nn.Module) -> None:
        self._storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.sizes: dict[str, int] = {}
        self.most = 0
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda layer, _, name=name: self._note(name, layer))
            module.register_full_backward_pre_hook(lambda *_: self._count())

    def _note(self, prefix: str, layer: nn.Module) -> None:
        for key, parameter in layer.named_parameters(recurse=False):
            assert parameter.numel(), "the layer runs, so its weights are there"
            reference = StorageWeakRef(parameter.untyped_storage())
            self._storages[reference.cdata] = reference, parameter.numel(), f"{prefix}.{key}"
            self.sizes[f"{prefix}.{key}"] = parameter.numel()
        self._count()

    def _count(self) -> None:
        self.most = max(self.most, sum(self.living().values()))

    def living(self) -> dict[str, int]:
        """Return the elements of those that are in memory, by name."""
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return {name: elements for _, elements, name in self._storages.values()}

    def staying(self) -> dict[str, int]:
        """Return the same of those that stay: gloo's thread lets go of a buffer some time after it was filled."""
        end = time.monotonic() + PATIENCE
        while self.living() and time.monotonic() < end:
            time.sleep(0.01)
        return self.living()


def settings(zero: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of three blocks under ZeRO 3, with `zero` on top of `HELD_NO_LONGER`."""
    return {"engine": "deepspeed", "zero_optimization": {**HELD_NO_LONGER, **zero}, "num_layers": LAYERS}


def make(flat: dict[str, Any], zero: dict[str, Any]) -> tuple[Config, Any, Any]:
    """Return config, engine and mesh of a model of three blocks, on the ranks that exist."""
    config = matrix.make_config({**settings(zero), **flat}, dist.get_world_size())
    mesh = matrix.make_mesh(config)
    return config, build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective()), mesh


@dataclass
class Held:
    """Elements in memory, by name, between the passes of the last step and at the end; the most at any time; and those
    of all weights."""

    between: dict[str, int]
    after: dict[str, int]
    most: int
    weights: int


def held(flat: dict[str, Any], zero: dict[str, Any], steps: int = 2) -> Held:
    """Train some steps and count.

    In the first step DeepSpeed learns the order of layers, so that it keeps nothing on purpose before the second."""
    config, engine, mesh = make(flat, zero)
    gathered = Gathered(engine.model)
    between: list[dict[str, int]] = []
    backward = engine._backward

    def counted(*arguments: Any) -> None:
        between.append(gathered.staying())
        backward(*arguments)

    engine._backward = counted
    for step, batch in enumerate(matrix.make_batches(config, steps)):
        engine.train_step(matrix.micro_batches(config, batch, mesh), step)
    assert len(between) == steps
    assert len(gathered.sizes) == len(list(engine.model.parameters()))
    return Held(between[-1], gathered.staying(), gathered.most, sum(gathered.sizes.values()))


@pytest.mark.parametrize("flat", MODELS.values(), ids=MODELS)
def test_nothing_gathered_stays_between_the_passes(flat: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 300)
    for found in run_ranks(2, held, flat, {}):
        assert found.between == found.after == {}
        assert (
            found.most <= (BLOCK if flat.get("checkpoint_activations") else LAYER) + LAYER
        )  # the one before may be going


@pytest.mark.parametrize(
    ("world_size", "flat", "zero"),
    [
        (4, {**LLAMA, "mlp_multiple_of": 8, "model_parallel_size": 2, "sequence_parallel": True}, {}),
        (2, NEOX, {"offload_param": {"device": "cpu"}}),
    ],
    ids=["tensor and sequence parallel", "offloaded weights"],
)
def test_nothing_stays_in_other_layouts(world_size: int, flat: dict[str, Any], zero: dict[str, Any]) -> None:
    for found in run_ranks(world_size, held, flat, zero):
        assert found.between == found.after == {}


def test_nothing_stays_where_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_wins", lambda: True)
    monkeypatch.setattr(linear, "SMALLEST", 0)
    for found in run_ranks(2, held, NEOX, {}):
        assert found.between == found.after == {}


def test_without_lending_all_matrices_of_the_blocks_would_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 0.5)
    monkeypatch.setattr(through_deepspeed, "lend", lambda _: None)
    matrices = {"query_key_value": 3 * 32 * 32, "dense": 32 * 32, "linear1": 4 * 32 * 32, "linear2": 4 * 32 * 32}
    for found in run_ranks(2, held, NEOX, {}):
        assert sorted(found.between.values()) == sorted([*matrices.values()] * LAYERS)
        assert {name.split(".")[-2] for name in found.between} == set(matrices)
        assert found.after == {}


@pytest.mark.parametrize(
    "zero",
    [
        {},
        {"stage3_max_reuse_distance": 20_000},
        {"stage3_max_reuse_distance": 40_000, "stage3_max_live_parameters": 50},
        {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 0},
        {"stage3_max_live_parameters": 20_000},
        {"stage3_max_live_parameters": 20_000, "stage3_prefetch_bucket_size": 5000},
    ],
    ids=["none", "reuse", "reuse beyond live", "all reuse", "live", "prefetched"],
)  # fmt: skip
def test_what_deepspeed_keeps_on_purpose_is_planned(zero: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the third step. Weights stay that are used again within the distance, or that were fetched ahead."""
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 0.5)
    live = Layout.of(matrix.make_config({**settings(zero), **NEOX}, 2)).live
    for found in run_ranks(2, held, NEOX, zero, 3):
        planned, kept = min(found.weights, live), sum(found.between.values())
        assert planned - LAYER <= kept <= min(found.weights, planned + 2 * LAYER)  # a buffer may still be going
        assert found.after == {}


def first_step(flat: dict[str, Any]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return loss, norm and this rank's share of every gradient."""
    config, engine, mesh = make(flat, {})
    captured = matrix.tiny.capture_gradients(engine)
    result = engine.train_step(matrix.micro_batches(config, matrix.make_batches(config, 1)[0], mesh), 0)
    return result.loss, result.grad_norm, captured[0]


@pytest.mark.parametrize("name", ["llama, tied, bf16", "llama, operations, fp8"])
def test_not_a_bit_of_a_gradient_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lent = run_ranks(2, first_step, MODELS[name])
    monkeypatch.setattr(through_deepspeed, "lend", lambda _: None)
    for (loss, norm, gradients), (its_loss, its_norm, others) in zip(
        lent, run_ranks(2, first_step, MODELS[name]), strict=True
    ):
        assert (loss, norm) == (its_loss, its_norm)
        assert gradients.keys() == others.keys()
        assert all(torch.equal(gradient, others[key]) for key, gradient in gradients.items())


@pytest.mark.parametrize(
    "name", ["neox, tied, learned positions", "neox, operations", "llama, recomputed"]
)  # fmt: skip
def test_every_gradient_is_that_without_zero(name: str) -> None:
    layout = {"engine": "deepspeed", "zero_optimization": HELD_NO_LONGER, "gradient_accumulation_steps": 2}
    matrix.assert_equal(matrix.run_layout({**MODELS[name], **layout}, 2), matrix.run_reference(MODELS[name]), 1e-5)
