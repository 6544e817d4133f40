"""fp8 in a layout: the same bits where every process sees whole tensors, and float8's rounding where it sees shares."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.parallel.matrix import Trace, assert_equal, run_layout  # isort: skip

from megatron.config.resolve import resolve
from megatron.proof.compare import ALLOWED
from megatron.proof.shrink import shrink

FP8: dict[str, Any] = {
    "precision": "fp8", "gpt_j_residual": True, "rotary_pct": 0.5, "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.0,
}  # fmt: skip
"""Not clipped: DeepSpeed sums the norm in another order, and float8 makes much of the last bit of a weight."""


@functools.cache
def one_process() -> Trace:
    """The run of one process, with micro-batches of the layouts' size: a scale is that of a micro-batch."""
    return run_layout(FP8, 1)


WHOLE = {
    "data, ZeRO 3": {"stage": 3, "gradient_accumulation_steps": 2},
    "pipeline, recomputed": {"stage": 1, "pipe_parallel_size": 2, "checkpoint_activations": True},
}
SHARED = {
    "tensor and sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "context": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_tensors_have_the_same_scales(name: str) -> None:
    assert_equal(run_layout({**FP8, **WHOLE[name]}, 2), one_process(), 1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_shares_have_scales_of_their_own(name: str) -> None:
    """Measured: losses within 3e-4, norms within 8e-3, gradients within 0.14."""
    trace, reference = run_layout({**FP8, **SHARED[name]}, 2), one_process()
    numbers, gradients = ALLOWED["fp8"]
    assert trace.losses == pytest.approx(reference.losses, rel=numbers)
    assert trace.grad_norms == pytest.approx(reference.grad_norms, rel=numbers)
    with pytest.raises(AssertionError):
        assert_equal(trace, reference, 1e-6)
    assert_equal(trace, reference, gradients)


@pytest.mark.parametrize("keys", [{}, {"activation": "swiglu"}, {"num_kv_heads": 4, "rotary_pct": 0.25}])
def test_a_trial_of_fp8_is_wide_enough_to_multiply_in_float8(keys: dict[str, Any]) -> None:
    sizes = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "seq_length": 64,
        "model_parallel_size": 2,
    }
    flat = {**sizes, "max_position_embeddings": 64, "train_iters": 9, "precision": "fp8", "mlp_multiple_of": 32, **keys}
    config = shrink(resolve(flat, 2)).config
    widths = (config.model.hidden_size, config.model.hidden_size // 2, config.model.intermediate_size // 2)
    assert [width % 16 for width in widths] == [0, 0, 0]
