"""What computes the operations of a model; every choice computes the same function."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section, setting

LossFusion = Literal["auto", True, False, "triton", "cuda", "cpp"]
Float8Fusion = Literal["auto", True, False, "triton", "transformer_engine"]
SoftmaxFusion = Literal["auto", True, False, "triton", "cpp"]
ElementWiseFusion = Literal["auto", True, False, "triton", "compile"]
RotaryFusion = Literal["auto", True, False, "triton", "cpp", "compile"]
NormFusion = Literal["auto", True, False, "triton", "apex", "liger", "transformer_engine", "cpp", "compile"]
ActivationFusion = Literal["auto", True, False, "triton", "liger", "cpp", "compile"]
OptimizerFusion = Literal["auto", True, False, "triton", "apex", "cpp"]

_MEANING = (
    "auto: on a GPU what was measured to be the fastest there, on a CPU cpp where there is one, else PyTorch's; true: "
    "a fused kernel wherever one can run; false: PyTorch's; or the name of one."
)
_COMPILED = (
    f"{_MEANING} compile is torch.compile, the last that true tries; on a CPU it takes a C++ compiler and seconds for "
    "each operation."
)


AttentionBackend = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "triton", "flash2", "flash3", "cpp", "dense"]


class KernelsConfig(Section):
    """Which kernels compute the operations of a model: a table at the start of a run says what was chosen, and why."""

    attention_backend: AttentionBackend = setting(
        "auto",
        "What computes attention. auto: on a GPU what was measured to be the fastest there, else triton for windows, "
        "documents and alibi, and sdpa; on a CPU cpp. sdpa: PyTorch's, whichever of its kernels; cudnn, flash, "
        "efficient: that one. triton: the library's own. cpp: its own for a CPU. flash2, flash3: the package "
        "flash-attn. dense: two products, with all scores in memory. What one of them cannot compute goes to sdpa.",
    )
    scaled_upper_triang_masked_softmax_fusion: SoftmaxFusion = setting(
        "auto", f"What computes the causal softmax of attention_backend: dense. {_MEANING}"
    )
    scaled_masked_softmax_fusion: SoftmaxFusion = setting(
        "auto", f"What computes its softmax within windows, documents and left padding. {_MEANING}"
    )
    layernorm_fusion: NormFusion = setting("auto", f"What computes norm: layernorm. {_COMPILED}")
    rmsnorm_fusion: NormFusion = setting("auto", f"What computes norm: rmsnorm. {_COMPILED}")
    rope_fusion: RotaryFusion = setting("auto", f"What turns queries and keys by their positions. {_COMPILED}")
    activation_fusion: ActivationFusion = setting(
        "auto", f"What computes the bias and the activation of an MLP: gelu, swiglu and geglu. {_COMPILED}"
    )
    bias_dropout_fusion: ElementWiseFusion = setting(
        "auto", f"What computes the hidden dropout and the addition to the residual stream. {_COMPILED}"
    )
    cross_entropy_fusion: LossFusion = setting(
        "auto",
        "What turns logits into losses, and into their own gradients; cuda is built by nvcc, and cpp "
        "by the C++ compiler, when it is first used. "
        f"{_MEANING}",
    )
    compile: Literal["auto", True, False] = setting(
        "auto",
        "Compile the decoder blocks by torch.compile, each by itself: the first step then takes up to a minute longer, "
        "less where a run before it left its code in the cache. auto: no, until it is measured on a GPU; on a CPU it "
        "costs seconds of C++ compilation, and what the blocks do there is mostly matrix products. Under ZeRO 3 the "
        "weights of a compiled block are gathered at once.",
    )
    cuda_graphs: Literal["auto", True, False] = setting(
        "auto",
        "Record the kernels of a step as CUDA graphs, and launch them as one piece, for small models: the whole "
        "step on one process with one micro-batch, else the passes and the update each by itself; in the library's own "
        "engine. auto: no, until it is measured on a GPU.",
    )
    fp8_fusion: Float8Fusion = setting(
        "auto",
        "What measures and rounds the factors of float8 products, with precision: fp8. auto: a fused kernel wherever "
        "one can run; false: PyTorch's, which is slow unless compiled; transformer_engine: its whole linear layer.",
    )
    optimizer_fusion: OptimizerFusion = setting(
        "auto",
        "What applies AdamW in the library's own engine, at ZeRO stage 0: a fused kernel clips, updates and rounds the "
        f"weights in one pass over memory. {_MEANING}",
    )
