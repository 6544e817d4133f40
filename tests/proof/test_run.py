"""The proof passes for layouts that are right, and fails, naming the tensors, where one layer is sabotaged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import preload, run_ranks

preload()
from megatron.config.resolve import resolve  # noqa: E402
from megatron.engine import build, pipeline  # noqa: E402
from megatron.engine.step import StepEngine  # noqa: E402
from megatron.parallel.collectives import TensorRegion  # noqa: E402
from megatron.parallel.layers import RowParallelLinear  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.proof.run import prove  # noqa: E402
from megatron.proof.shrink import Trial, shrink  # noqa: E402

BASE: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "train_iters": 1000,
}


def trial_of(**keys: Any) -> Trial:
    sizes = (keys.get(f"{axis}_parallel_size", 1) for axis in ("model", "pipe", "context"))
    world_size = 1
    for size in sizes:
        world_size *= size
    return shrink(resolve({**BASE, **keys}, world_size))


def run_trial(trial: Trial, sabotage: Callable[[], None] = lambda: None) -> tuple[list[bool], str]:
    """Return every rank's verdict and what rank 0 printed."""

    def body() -> tuple[bool, str]:
        sabotage()
        parallel = trial.config.parallel
        sizes = (parallel.model_parallel_size, max(1, parallel.pipe_parallel_size), parallel.context_parallel_size)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            passed = prove(trial, Mesh.create(*sizes, device="cpu"))
        return passed, printed.getvalue()

    ranks = run_ranks(trial.world_size, body)
    assert all(not text for _, text in ranks[1:])
    return [passed for passed, _ in ranks], ranks[0][1]


RIGHT: dict[str, dict[str, Any]] = {
    "data, ZeRO 0, clipping off": {"gradient_clipping": 0.0},
    "ZeRO 3, bf16, recomputation": {
        "zero_optimization": {"stage": 3}, "precision": "bf16", "checkpoint_activations": True
    },
    "fp16 on a CPU": {"zero_optimization": {"stage": 2}, "precision": "fp16"},
    "fp8, context": {"context_parallel_size": 2, "precision": "fp8"},
    "tensor, sequence, grouped queries, gated": {
        "model_parallel_size": 2, "sequence_parallel": True, "num_kv_heads": 4, "activation": "swiglu",
        "norm": "rmsnorm", "zero_optimization": {"stage": 1},
    },
    "pipeline, tied, accumulation": {
        "pipe_parallel_size": 2, "no_weight_tying": False, "gradient_accumulation_steps": 16,
        "zero_optimization": {"stage": 1},
    },
    "context, windows": {
        "context_parallel_size": 2, "context_parallel_method": "all_to_all", "sliding_window_width": 256,
        "attention_config": [[["global", "local"], "all"]],
    },
    "offload, context": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "context_parallel_size": 2
    },
    "offload, pipeline": {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "pipe_parallel_size": 2
    },
    "offload of parameters too, tensor, sequence": {
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}
        },
        "model_parallel_size": 2, "sequence_parallel": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_passes(name: str) -> None:
    passed, text = run_trial(trial_of(**RIGHT[name]))
    assert all(passed), text
    assert text.rstrip().endswith("PASS: this layout trains as one process does.")
    assert "differs" not in text
    assert text.count("loss, step 3") == (2 if "16" in name or "fp8" in name else 1)


def bias_on_every_rank() -> None:
    """y has the bias tp times."""
    TensorRegion.once = lambda self, bias: bias  # type: ignore[method-assign]


def norms_not_summed() -> None:
    """Sequence parallelism whose replicated parameters keep the gradient of their own tokens."""
    build.sum_partial_gradients = lambda live, region: None


def stages_not_summed() -> None:
    """A tied embedding of which each stage sees only its own use."""
    pipeline._sum_shared_gradients = lambda live, mesh: None


def tokens_of_one_rank() -> None:
    """The loss of a step divided by one rank's tokens instead of all ranks'."""
    StepEngine._sum = lambda self, value: value  # type: ignore[method-assign]


def one_layer_of_one_rank() -> None:
    """One tensor parallel rank's share of the MLPs is a thousandth too large, which the loss does not show."""
    right = RowParallelLinear.forward

    def wrong(self: Any, inputs: Any) -> Any:
        if self.region.axis.size > 1 and self.region.axis.rank == 1 and self.weight.shape[1] == 64:
            return right(self, inputs) + F.linear(inputs, self.weight) / 1000
        return right(self, inputs)

    RowParallelLinear.forward = wrong  # type: ignore[method-assign]


SABOTAGED = [
    # sabotage, layout, what is printed
    (bias_on_every_rank, {"model_parallel_size": 2}, ["gradient of layers.1.mlp.linear2.weight, step 2"]),
    (
        norms_not_summed,
        {"model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 1}},
        ["gradient of layers.0.input_layernorm.weight, step 1", "layernorm.bias (weight) has 2 versions"],
    ),
    (
        stages_not_summed,
        {"pipe_parallel_size": 2, "no_weight_tying": False, "zero_optimization": {"stage": 1}},
        ["gradient of embedding.word_embeddings.weight, step 1", "stage 0"],
    ),
    (
        tokens_of_one_rank,
        {"zero_optimization": {"stage": 2}},
        ["gradient of layers.0.attention.query_key_value.weight, step 1"],
    ),
    (
        one_layer_of_one_rank,
        {"model_parallel_size": 2, "precision": "bf16"},
        ["gradient of layers.0.mlp.linear1.weight, step 1", "tensor rank 1"],
    ),
]


@pytest.mark.parametrize(("sabotage", "keys", "said"), SABOTAGED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_sabotaged_layout_fails(sabotage: Callable[[], None], keys: dict[str, Any], said: list[str]) -> None:
    passed, text = run_trial(trial_of(**keys), sabotage)
    assert not any(passed)
    assert text.rstrip().splitlines()[-1].startswith("FAIL: ")
    listing = text.split("gradients differ. The first to do so")[1]
    assert all(words in listing for words in said), text


def test_ranks_of_a_trial_have_different_numbers_of_trained_tokens() -> None:
    from megatron.proof.trace import micro_batches

    trial = trial_of(gradient_accumulation_steps=2)

    def tokens() -> list[float]:
        return [float(batch.loss_mask.sum()) for batch in micro_batches(trial.config, 0, Mesh.create(device="cpu"))]

    counts = run_ranks(2, tokens)
    assert len({count for rank in counts for count in rank}) > 2
    assert sum(counts[0]) != sum(counts[1])
    assert not dist.is_initialized()
