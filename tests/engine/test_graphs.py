"""CUDA graphs of a micro-batch: what is recorded and what is refused, and on a GPU the same training as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.data.batch import Batch
from megatron.engine.build import build_engine
from megatron.engine.graphs import RecordedModel, obstacle
from megatron.errors import ConfigError
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Axis, Mesh
from tests.parallel import matrix


def mesh(device: str, **sizes: int) -> Mesh:
    """Return a mesh that only says where it is."""
    axes = {name: Axis(name, sizes.get(name, 1)) for name in ("dp", "tp", "pp", "cp", "replicas", "ep", "world")}
    return Mesh(**axes, device=torch.device(device))


@pytest.mark.parametrize(
    ("keys", "where", "reason"),
    [
        ({}, mesh("cpu"), "they need a CUDA device, and this is cpu."),
        ({}, mesh("cuda", tp=2), "processes that share a layer or a sequence"),
        ({}, mesh("cuda", cp=2), "processes that share a layer or a sequence"),
        ({"checkpoint_activations": True}, mesh("cuda"), "the random generator's state"),
        ({"offload_activations": True}, mesh("cuda"), "offload_activations copies to the CPU"),
        ({"optimizer_in_backward": True, "gradient_clipping": 0}, mesh("cuda"), "updates weights within"),
        ({"checkpoint_activations": True, "checkpoint_operations": ["norm", "activation"]}, mesh("cuda"), ""),
        ({"hidden_dropout": 0.1}, mesh("cuda", dp=2), ""),
    ],
)
def test_what_cannot_be_recorded(keys: dict[str, Any], where: Mesh, reason: str) -> None:
    found = obstacle(matrix.make_config(keys), where)
    assert found.startswith(reason) if reason.startswith("they") else reason in found
    assert bool(found) == bool(reason)


def test_asking_for_it_on_a_cpu_is_an_error() -> None:
    config = matrix.make_config({"cuda_graphs": True})
    with pytest.raises(ConfigError, match=r"cuda_graphs = true: they need a CUDA device.*Set cuda_graphs: auto"):
        build_engine(config, Mesh.single(), build_model(config, matrix.VOCAB, Mesh.single()), build_objective())


class Recorder:
    """Records as CUDA does: the buffers are fixed, a replay copies into them and computes from them alone."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.buffers: tuple[Tensor, ...] = ()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        self.recordings += 1
        self.buffers = inputs

        def replay(*given: Tensor) -> Tensor:
            self.replays += 1
            for buffer, each in zip(self.buffers, given, strict=True):
                buffer.copy_(each)
            result: Tensor = module(*self.buffers)
            return result

        return replay


def test_batches_of_one_shape_are_replayed_and_others_are_not() -> None:
    config = matrix.make_config({})
    model = build_model(config, matrix.VOCAB, Mesh.single())
    recorder = Recorder()
    recorded = RecordedModel(model, recorder)
    first, second, third = matrix.make_batches(config, steps=3)
    kept = first.tokens.clone()
    for batch in (first, second):
        recorded.record(batch)
        found, tokens = build_objective()(recorded, batch)
        expected, _ = build_objective()(model, batch)
        assert torch.equal(found, expected)
        assert tokens == batch.loss_mask.sum()
    assert (recorder.recordings, recorder.replays) == (1, 2)
    assert torch.equal(first.tokens, kept), "the buffers are the batch's own"
    assert not torch.equal(recorder.buffers[0], first.tokens)
    short = Batch(third.tokens[:, :5], third.labels[:, :5], third.loss_mask[:, :5])
    divided = Batch(third.tokens, third.labels, third.loss_mask, torch.zeros_like(third.tokens))
    for batch in (short, divided):
        assert torch.isfinite(build_objective()(recorded, batch)[0])
    assert recorder.replays == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"hidden_dropout": 0.1}])
def test_a_recorded_step_equals_one_that_is_not(keys: dict[str, Any]) -> None:
    """Steps of four micro-batches and an evaluation, with the same masks of dropout."""
    outcomes = []
    for recorded in (False, True):
        flat = {"cuda_graphs": recorded, "gradient_accumulation_steps": 4, **keys}
        config = matrix.make_config(flat)
        device = Mesh.single(torch.device("cuda"))
        engine = build_engine(config, device, build_model(config, matrix.VOCAB, device), build_objective())
        steps = [matrix.micro_batches(config, batch, device) for batch in matrix.make_batches(config)]
        results = [engine.queue_step(step, iteration) for iteration, step in enumerate(steps)]
        outcomes.append(([each.read() for each in results], engine.evaluate(steps[0])[:2]))
    (plain, evaluation), (graphed, other) = outcomes
    for one, two in zip(plain, graphed, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-6)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5)
    assert evaluation == pytest.approx(other, rel=1e-6)
