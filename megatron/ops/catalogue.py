"""Every operation that can be computed in several ways, and what computes it; eager is what runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron.ops import probes
from megatron.ops.attention_operation import ATTENTION
from megatron.ops.choice import EAGER, Candidate, Operation, Probe
from megatron.ops.compiled import COMPILE, Compiled

_TRITON = "megatron.ops.triton"


def _operation(name: str, eager: str, twin: str, probe: Probe, triton: str, *others: Candidate) -> Operation:
    """Return an operation of one eager function and one kernel of ours. eager, twin, triton: below `megatron.ops`."""
    fused = Candidate("triton", f"{_TRITON}.{triton}", "triton")
    return Operation(name, f"megatron.ops.{twin}", (Candidate(EAGER, f"megatron.ops.{eager}"), fused, *others), probe)


def _element_wise(name: str, module: str, probe: Probe, *others: Candidate, twin: str = "") -> Operation:
    """Return an operation that torch.compile can fuse as well, whose functions are all named after it."""
    place = f"{module}:{name}"
    compiled = Compiled(COMPILE, f"megatron.ops.{place}")
    return _operation(name, place, twin or place, probe, place, *others, compiled)


def _apex(place: str) -> Candidate:
    return Candidate("apex", f"megatron.ops.{place}", "apex")


def _liger(place: str) -> Candidate:
    return Candidate("liger", f"megatron.ops.liger:{place}", "liger_kernel")


def _transformer_engine(place: str) -> Candidate:
    return Candidate("transformer_engine", f"megatron.ops.{place}", "transformer_engine")


def _cuda(place: str) -> Candidate:
    return Candidate("cuda", f"megatron.ops.cuda.{place}", "torch", "megatron.ops.cuda.build:make_ready")


def _cpp(place: str) -> Candidate:
    return Candidate("cpp", f"megatron.ops.cpu.{place}", "", "megatron.ops.cpu.library:make_ready", "cpu")


_OPERATIONS = (
    _element_wise(
        "layer_norm", "norms", probes.layer_norm,
        _apex("apex_norms:layer_norm"), _liger("layer_norm"),
        _transformer_engine("transformer_engine_norms:layer_norm"), _cpp("norms:layer_norm"),
        twin="norms:layer_norm_reference",
    ),
    _element_wise(
        "rms_norm", "norms", probes.rms_norm,
        _apex("apex_norms:rms_norm"), _liger("rms_norm"), _transformer_engine("transformer_engine_norms:rms_norm"),
        _cpp("norms:rms_norm"),
        twin="norms:rms_norm_reference",
    ),
    _element_wise(
        "add_layer_norm", "norms", probes.add_layer_norm, _cpp("norms:add_layer_norm"),
        twin="norms:add_layer_norm_reference",
    ),
    _element_wise(
        "add_rms_norm", "norms", probes.add_rms_norm, _liger("add_rms_norm"), _cpp("norms:add_rms_norm"),
        twin="norms:add_rms_norm_reference",
    ),
    _element_wise("rotate_packed", "rotary", probes.rotate_packed, _cpp("rotary:rotate_packed")),
    _element_wise("bias_gelu", "activations", probes.bias_activation, _cpp("activations:bias_gelu")),
    _element_wise("bias_gelu_tanh", "activations", probes.bias_activation, _cpp("activations:bias_gelu_tanh")),
    _element_wise(
        "bias_swiglu", "activations", probes.bias_activation, _liger("bias_swiglu"), _cpp("activations:bias_swiglu")
    ),
    _element_wise("bias_geglu", "activations", probes.bias_activation, _cpp("activations:bias_geglu")),
    _element_wise("add_dropped", "dropout_add", probes.add_dropped, twin="dropout_add:add_dropped_reference"),
    _operation(
        "cross_entropy", "cross_entropy:block_losses", "cross_entropy:block_losses", probes.cross_entropy,
        "cross_entropy:block_losses", _cuda("cross_entropy:block_losses"),
        _cpp("cross_entropy:block_losses"),
    ),
    _operation(
        "share_losses", "logits:share_losses", "logits:share_losses", probes.share_losses,
        "cross_entropy:share_losses", _cuda("cross_entropy:share_losses"),
        _cpp("cross_entropy:share_losses"),
    ),
    _operation(
        "masked_softmax", "softmax:masked_softmax", "softmax:masked_softmax_reference", probes.masked_softmax,
        "softmax:masked_softmax", _cpp("softmax:masked_softmax"),
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
        "adamw:sum_of_squares", _apex("apex_adam:sum_of_squares"), _cpp("adamw:sum_of_squares"),
    ),
    _operation(
        "adamw_update_", "adamw:adamw_update_", "adamw:adamw_update_reference_", probes.adamw_update_,
        "adamw:adamw_update_", _apex("apex_adam:adamw_update_"), _cpp("adamw:adamw_update_"),
    ),
    replace(
        _operation(
            "float8_linear", "fp8:float8_linear", "fp8:float8_linear_reference", probes.float8_linear,
            "fp8:float8_linear",
            _transformer_engine("transformer_engine_linear:float8_linear"),
        ),
        unmeasured="triton",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, Operation] = {operation.name: operation for operation in (*_OPERATIONS, *ATTENTION)}
