"""Every operation that can be computed in several ways, and what computes it; eager is what runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron.ops import probes
from megatron.ops.attention_operation import ATTENTION
from megatron.ops.choice import EAGER, Candidate, Operation, Probe


def _operation(name: str, eager: str, twin: str, probe: Probe, triton: str, *others: Candidate) -> Operation:
    fused = Candidate("triton", f"megatron.ops.triton.{triton}", "triton")
    return Operation(name, f"megatron.ops.{twin}", (Candidate(EAGER, f"megatron.ops.{eager}"), fused, *others), probe)


_APEX_NORMS = "megatron.ops.apex_norms"
_TE_LINEAR = "megatron.ops.transformer_engine_linear"
_LIGER = "megatron.ops.liger"


def _cuda(place: str) -> Candidate:
    return Candidate("cuda", f"megatron.ops.cuda.{place}", "torch", "megatron.ops.cuda.build:make_ready")


_OPERATIONS = (
    _operation(
        "layer_norm", "norms:layer_norm", "norms:layer_norm_reference", probes.layer_norm, "norms:layer_norm",
        Candidate("apex", f"{_APEX_NORMS}:layer_norm", "apex"),
        Candidate("liger", f"{_LIGER}:layer_norm", "liger_kernel"),
    ),
    _operation(
        "rms_norm", "norms:rms_norm", "norms:rms_norm_reference", probes.rms_norm, "norms:rms_norm",
        Candidate("apex", f"{_APEX_NORMS}:rms_norm", "apex"),
        Candidate("liger", f"{_LIGER}:rms_norm", "liger_kernel"),
    ),
    _operation(
        "add_layer_norm", "norms:add_layer_norm", "norms:add_layer_norm_reference", probes.add_layer_norm,
        "norms:add_layer_norm",
    ),
    _operation(
        "add_rms_norm", "norms:add_rms_norm", "norms:add_rms_norm_reference", probes.add_rms_norm,
        "norms:add_rms_norm",
        Candidate("liger", f"{_LIGER}:add_rms_norm", "liger_kernel"),
    ),
    _operation(
        "rotate_packed", "rotary:rotate_packed", "rotary:rotate_packed", probes.rotate_packed, "rotary:rotate_packed"
    ),
    _operation(
        "bias_gelu", "activations:bias_gelu", "activations:bias_gelu", probes.bias_activation, "activations:bias_gelu"
    ),
    _operation(
        "bias_gelu_tanh", "activations:bias_gelu_tanh", "activations:bias_gelu_tanh", probes.bias_activation,
        "activations:bias_gelu_tanh",
    ),
    _operation(
        "bias_swiglu", "activations:bias_swiglu", "activations:bias_swiglu", probes.bias_activation,
        "activations:bias_swiglu",
        Candidate("liger", f"{_LIGER}:bias_swiglu", "liger_kernel"),
    ),
    _operation(
        "bias_geglu", "activations:bias_geglu", "activations:bias_geglu", probes.bias_activation,
        "activations:bias_geglu",
    ),
    _operation(
        "add_dropped", "dropout_add:add_dropped", "dropout_add:add_dropped_reference", probes.add_dropped,
        "dropout_add:add_dropped",
    ),
    _operation(
        "cross_entropy", "cross_entropy:block_losses", "cross_entropy:block_losses", probes.cross_entropy,
        "cross_entropy:block_losses", _cuda("cross_entropy:block_losses"),
    ),
    _operation(
        "share_losses", "logits:share_losses", "logits:share_losses", probes.share_losses,
        "cross_entropy:share_losses", _cuda("cross_entropy:share_losses"),
    ),
    _operation(
        "masked_softmax", "softmax:masked_softmax", "softmax:masked_softmax", probes.masked_softmax,
        "softmax:masked_softmax",
    ),
    _operation(
        "grouped_matmul", "grouped_gemm:grouped_matmul", "grouped_gemm:grouped_matmul", probes.grouped_matmul,
        "grouped_matmul:grouped_matmul",
    ),
    _operation(
        "selective_scan", "scan:selective_scan", "scan:selective_scan", probes.selective_scan, "scan:selective_scan"
    ),
    _operation(
        "sum_of_squares", "adamw:sum_of_squares", "adamw:sum_of_squares", probes.sum_of_squares,
        "adamw:sum_of_squares",
    ),
    _operation(
        "adamw_update_", "adamw:adamw_update_", "adamw:adamw_update_reference_", probes.adamw_update_,
        "adamw:adamw_update_",
    ),
    replace(
        _operation(
            "float8_linear", "fp8:float8_linear", "fp8:float8_linear_reference", probes.float8_linear,
            "fp8:float8_linear",
            Candidate("transformer_engine", f"{_TE_LINEAR}:float8_linear", "transformer_engine"),
        ),
        unmeasured="triton",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, Operation] = {operation.name: operation for operation in (*_OPERATIONS, *ATTENTION)}
