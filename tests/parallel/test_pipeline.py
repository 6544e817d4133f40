"""Pipelines equal one process: losses, norms, the gradient of every parameter, weights and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megatron.engine.build import build_engine
from megatron.errors import ConfigError
from megatron.model.build import DTYPES, build_model, build_plans
from megatron.model.stage import StageModel, StagePlan
from megatron.model.stream import Stream
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from tests.engine import tiny
from tests.parallel.matrix import (
    VOCAB,
    Trace,
    assert_equal,
    make_batches,
    make_config,
    make_mesh,
    micro_batches,
    run_layout,
    run_reference,
    train_layout,
)
from tests.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "pythia": {"gpt_j_residual": True},
    "gpt2": {"pos_emb": "learned", "no_weight_tying": False},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False},
    "tied, serial": {"no_weight_tying": False, "num_layers": 3},
    "rpe": {"pos_emb": "rpe", "num_layers": 3},
    "alibi, tied norms": {"pos_emb": "alibi", "gpt_j_residual": True, "gpt_j_tied": True, "no_weight_tying": False},
}

# model, stages, replicas, accumulation, more keys
CASES = [
    *((name, 2, 1, 4, {}) for name in MODELS),
    *(("tied, serial", 2, replicas, accumulation, {}) for replicas in (1, 2) for accumulation in (1, 2, 4)),
    ("tied, serial", 4, 1, 2, {"num_layers": 5}),
    ("rpe", 3, 1, 2, {}),
    ("gpt2", 2, 2, 2, {"stage": 0}),
    ("gpt2", 2, 1, 4, {"checkpoint_activations": True}),
    ("tied, serial", 2, 1, 2, {"checkpoint_activations": True, "checkpoint_num_layers": 2}),
    ("llama", 2, 2, 2, {"checkpoint_activations": True, "checkpoint_operations": ["attention", "activation"]}),
    ("pythia", 2, 1, 2, {"checkpoint_activations": True, "checkpoint_first_layers": 1}),
    ("gpt2", 2, 2, 2, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}),
    ("pythia", 2, 1, 2, {"pipe_partition_method": "uniform"}),
    ("pythia", 2, 1, 2, {"pipe_partition_method": "type:transformer|mlp"}),
    ("pythia", 2, 2, 2, {"gradient_clipping": 0.0, "weight_decay": 0.0}),
]


CHANGES = {"num_layers", "gradient_clipping", "weight_decay"}  # of the keys above, those that change the numbers


def layout(name: str, stages: int, accumulation: int, more: dict[str, Any]) -> dict[str, Any]:
    sizes = {"pipe_parallel_size": stages, "gradient_accumulation_steps": accumulation}
    return {"stage": 1, **sizes, **MODELS[name], **more}


@pytest.mark.parametrize(("name", "stages", "replicas", "accumulation", "more"), CASES)
def test_a_pipeline_equals_one_process(name, stages, replicas, accumulation, more):
    flat = layout(name, stages, accumulation, more)
    trace = run_layout(flat, stages * replicas, segments=True)
    assert_equal(
        trace, run_reference({key: v for key, v in flat.items() if key != "pipe_partition_method"}, True), 1e-5
    )


COMBINED = [
    ("tied, serial", 4, {"model_parallel_size": 2}),
    ("rpe", 4, {"model_parallel_size": 2, "sequence_parallel": True, "checkpoint_activations": True}),
    ("pythia", 4, {"context_parallel_size": 2}),
    ("tied, serial", 8, {"model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}),
    ("gpt2", 8, {"model_parallel_size": 2, "sequence_parallel": True}),
]


@pytest.mark.parametrize(("name", "world_size", "more"), COMBINED)
def test_pipelines_of_tensor_and_context_parallel_ranks_equal_one_process(name, world_size, more):
    flat = layout(name, 2, 2, more)
    assert_equal(run_layout(flat, world_size), run_reference(flat), 1e-5)


@pytest.mark.parametrize("more", [{"model_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}])
def test_combined_in_bf16(more):
    flat = layout("tied, serial", 2, 2, {**more, "precision": "bf16"})
    assert_equal(run_layout(flat, 4), run_reference(flat), 5e-2)


def half_precision(flat: dict[str, Any], world_size: int) -> Trace:
    type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed asks for fp16 instructions on the CPU
    config = make_config(flat, world_size)
    return train_layout(config, make_batches(config))


@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
@pytest.mark.parametrize("name", ["pythia", "tied, serial"])
def test_half_precision_equals_one_process_to_its_rounding(name, precision, tolerance, replicas, accumulation):
    flat = {**MODELS[name], "precision": precision}
    if precision == "fp16":
        flat["fp16"] = {"enabled": True, "initial_scale_power": 8}
    ranks = run_ranks(2 * replicas, half_precision, layout(name, 2, accumulation, flat), 2 * replicas)
    [one] = run_ranks(1, half_precision, flat, 1)
    for trace in ranks:
        assert_equal(trace, one, tolerance)


def test_an_overflow_on_one_stage_skips_the_step_on_all():
    flat = layout("tied, serial", 2, 2, {"precision": "fp16", "fp16": {"enabled": True, "initial_scale_power": 24}})

    def train() -> list:
        type(get_accelerator()).is_fp16_supported = lambda self: True
        config = make_config(flat, 2)
        mesh = make_mesh(config)
        engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        result = engine.train_step(micro_batches(config, make_batches(config)[0], mesh), 0)
        return [result, all(map(torch.equal, before, engine.model.parameters()))]

    for result, unchanged in run_ranks(2, train):
        assert result.skipped
        assert unchanged
        assert result.grad_norm == float("inf")


DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.3}


def first_gradients(flat: dict[str, Any], world_size: int) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and this rank's gradients of one step."""
    config = make_config(flat, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    captured = tiny.capture_gradients(engine)
    result = engine.train_step(micro_batches(config, make_batches(config)[0], mesh), 7)
    return result.loss, captured[0]


def stages_in_one_process(flat: dict[str, Any], stages: int) -> tuple[float, dict[str, Tensor]]:
    """One micro-batch after another through all stages, each seeded as on its rank, without any pipeline."""
    config = make_config(flat, stages)
    mesh = Mesh.single()
    split = StagePlan.of(build_plans(config, VOCAB, mesh), stages, "parameters")
    plans = build_plans(config, VOCAB, mesh)
    models = [StageModel(plans, split, stage, "cpu", DTYPES["fp32"], config.numerics.seed) for stage in range(stages)]
    streams = [RngStreams(config.numerics.seed, replace(mesh, pp=replace(mesh.pp, rank=s))) for s in range(stages)]
    batch = make_batches(config)[0]
    total = batch.loss_mask.sum()
    loss = 0.0
    for number, part in enumerate(micro_batches(config, batch, mesh)):
        stream: Tensor | Stream = part.tokens
        for model, rng in zip(models, streams, strict=True):
            rng.start_micro_batch(7, number)
            stream = model(stream)
        micro_loss = models[-1].finish(stream, part.labels, part.loss_mask) / total
        micro_loss.backward()
        loss += float(micro_loss)
    gradients: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return loss, gradients


@pytest.mark.parametrize("recompute", [{}, {"checkpoint_activations": True, "checkpoint_num_layers": 2}])
def test_dropout_masks_are_those_of_stage_and_micro_batch_recomputed_or_not(recompute):
    flat = layout("tied, serial", 2, 4, {**DROPOUT, "num_layers": 5, **recompute})
    ranks = run_ranks(2, first_gradients, flat, 2)
    [(loss, expected)] = run_ranks(1, stages_in_one_process, flat, 2)
    found = {name: gradient for _, gradients in ranks for name, gradient in gradients.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert all(found_loss == pytest.approx(loss, rel=1e-6) for found_loss, _ in ranks)


@pytest.mark.parametrize("more", [{}, {"model_parallel_size": 2}])
def test_dropout_is_reproducible_bit_by_bit(more):
    flat = layout("gpt2", 2, 4, {**DROPOUT, **more})
    world_size = 2 * len(more) + 2
    first, second = (run_ranks(world_size, first_gradients, flat, world_size) for _ in range(2))
    recomputed = run_ranks(world_size, first_gradients, {**flat, "checkpoint_activations": True}, world_size)
    for rank in range(world_size):
        for name, gradient in first[rank][1].items():
            assert torch.equal(gradient, second[rank][1][name])
            assert torch.equal(gradient, recomputed[rank][1][name])


def sent_bytes(flat: dict[str, Any], world_size: int) -> int:
    """Return the bytes that this rank sends to other stages in its second step; shapes are told in the first."""
    config = make_config(flat, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    sent = []
    send = dist.send

    def counting_send(tensor: Tensor, *args: Any, **settings: Any) -> None:
        sent.append(tensor.numel() * tensor.element_size())
        send(tensor, *args, **settings)

    batches = [micro_batches(config, batch, mesh) for batch in make_batches(config)[:2]]
    engine.train_step(batches[0], 0)
    torch.distributed.send = counting_send
    engine.train_step(batches[1], 1)
    return sum(sent)


@pytest.mark.parametrize(("stages", "accumulation", "precision"), [(2, 4, "fp32"), (4, 2, "fp32"), (2, 2, "bf16")])
def test_stages_exchange_hidden_states_and_their_gradients_alone(stages, accumulation, precision):
    flat = layout("pythia", stages, accumulation, {"precision": precision, "num_layers": 4})
    config = make_config(flat, stages)
    hidden = config.batch.train_micro_batch_size_per_gpu * config.model.seq_length * config.model.hidden_size
    once = accumulation * hidden * DTYPES[precision].itemsize
    found = run_ranks(stages, sent_bytes, flat, stages)
    assert found == [once * ((rank < stages - 1) + (rank > 0)) for rank in range(stages)]


def test_batches_of_another_shape_can_be_evaluated_between_steps():
    flat = layout("gpt2", 2, 2, {})

    def train() -> list[float]:
        config = make_config(flat, 2)
        mesh = make_mesh(config)
        engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
        batches = [micro_batches(config, batch, mesh) for batch in make_batches(config)]
        short = [tiny.rows(batch, 0, 1) for batch in batches[0] + batches[1]]
        values = []
        for step in range(3):
            values.append(engine.train_step(batches[step], step).loss)
            values.append(engine.evaluate(short if step == 1 else batches[5])[0])
        return values

    first, second = run_ranks(2, train)
    assert first == second
    assert first[0] == pytest.approx(run_reference(flat).losses[0], rel=1e-5)
    assert len(set(first)) == len(first)


def test_stages_zero_to_three():
    assert make_config(layout("gpt2", 2, 2, {"stage": 0}), 2).parallel.pipe_parallel_size == 2
    for stage in (2, 3):
        with pytest.raises(ConfigError, match=r"zero_optimization.stage.*pipe_parallel_size"):
            make_config(layout("gpt2", 2, 2, {"stage": stage}), 2)


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_0_and_1_are_no_pipeline(size):
    config = make_config({"pipe_parallel_size": size})
    model = build_model(config, VOCAB, Mesh.single())
    assert type(model).__name__ == "SequentialModel"
