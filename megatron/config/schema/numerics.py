"""Initialisation, precision, dropout and the choices that change the arithmetic."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section, setting

InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


class NumericsConfig(Section):
    """What the numbers are stored in, where they start, and what is random."""

    precision: Literal["fp32", "fp16", "bf16", "fp8"] = setting(
        "fp32",
        "Type of the forward and backward passes (bfloat16 is another spelling of bf16); parameters always have fp32 "
        "masters. fp8 is bf16 in which the linear layers of the blocks multiply in 8 bits (docs/fp8.md): for GPUs of "
        "compute capability 8.9 or more, from about 1B parameters up. Unset: what the fp16 or bf16 block enables, or "
        "fp32.",
    )
    init_method: InitMethod = setting(
        "normal", "Initialisation of all weights except the output projections of attention and MLP."
    )
    output_layer_init_method: InitMethod = setting(
        "scaled_normal", "Initialisation of the output projections of attention and MLP."
    )
    init_method_std: float = setting(
        0.02, "Standard deviation of normal, scaled_normal and single_residual_scaled_normal.", unit="weight", gt=0
    )
    hidden_dropout: float = setting(
        0.0, "Dropout of embeddings and of what attention and MLP add to the stream.", unit="probability", ge=0, lt=1
    )
    attention_dropout: float = setting(0.0, "Dropout of attention probabilities.", unit="probability", ge=0, lt=1)
    apply_query_key_layer_scaling: bool = setting(
        False, "Compute attention scores divided by the layer's number, and undo it inside an fp32 softmax."
    )
    bias_gelu_fusion: bool = setting(
        False,
        "Use the tanh approximation of GELU, as the fused bias and GELU of GPT-NeoX does; which kernel computes it is "
        "for activation_fusion to say.",
    )
    mup_rp_embedding_mult: float = setting(
        1.0, "Learned and sinusoidal position vectors are multiplied by this.", unit="ratio", gt=0
    )
    seed: int = setting(1234, "Seed of initialisation, dropout and the order of the data.", unit="none", ge=1, lt=2**32)

    @property
    def weight_precision(self) -> Literal["fp32", "fp16", "bf16"]:
        """What weights, activations and gradients are held in: bf16 where only products are in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision
