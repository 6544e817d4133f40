"""The optimizer, its schedule, and the length of the run."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section, setting


class OptimizerConfig(Section):
    """The update rule and the learning rate at each step."""

    optimizer: dict[str, Any] = setting(
        {"type": "adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}},
        "{type, params}: adam (decoupled weight decay) with lr (peak), betas and eps.",
    )
    moments_dtype: Literal["fp32", "bf16"] = setting(
        "fp32",
        "What Adam's two moments are kept in. bf16 saves 4 bytes per parameter; the update is computed in fp32, and "
        "the moments are rounded up or down at random, by a function of seed and step. A resumed run may change it.",
    )
    optimizer_in_backward: bool = setting(
        False,
        "Update each weight in the backward pass as soon as its gradient is complete, and free the gradient: for "
        "models whose gradients would not fit. For ZeRO stage 0 with one micro-batch to a step and no clipping.",
    )
    weight_decay: float = setting(
        0.1, "Decoupled decay of all weights except biases and norms.", unit="per unit of learning rate", ge=0
    )
    gradient_clipping: float = setting(
        1.0, "Gradients are scaled so that their global L2 norm is at most this; 0 never clips.", unit="L2 norm", ge=0
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd"] = setting(
        "linear", "Shape of the learning rate after warm-up; wsd is warm-up, stable, decay."
    )
    lr_decay_iters: int | None = setting(
        None,
        "Horizon of the schedule, which warmup is a fraction of. Unset: lr_decay_fraction of train_iters, or "
        "train_iters.",
        unit="optimizer steps",
        ge=1,
    )
    lr_decay_fraction: float | None = setting(
        None, "Horizon of the schedule as a share of train_iters, where lr_decay_iters is unset.", unit="fraction", gt=0
    )
    min_lr: float = setting(0.0, "The learning rate never falls below this after warm-up.", unit="learning rate", ge=0)
    warmup: float = setting(
        0.01, "Share of the horizon in which the learning rate rises linearly.", unit="fraction", ge=0, le=1
    )
    wsd_decay_fraction: float = setting(
        0.1, "Last share of the horizon in which the wsd style decays.", unit="fraction", gt=0, le=1
    )
    wsd_decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = setting(
        "linear", "Shape of the wsd style's decay."
    )
    neox_compat: bool = setting(
        False,
        "Do as GPT-NeoX where we differ from it on purpose: a cosine that rises again after its end, unpacked and "
        "pack_until_overflow that draw from the first documents of the file whatever the split, loss on padding, and "
        "its formula of weight_by_num_documents.",
    )


class TrainingConfig(Section):
    """How long training runs, and what happens on the way."""

    train_iters: int | None = setting(
        None, "Optimizer steps of the whole run. Either this or train_epochs.", unit="optimizer steps", ge=1
    )
    train_epochs: int | None = setting(
        None, "Passes over the training data. Either this or train_iters.", unit="epochs", ge=1
    )
    eval_interval: int = setting(1000, "Steps between validations.", unit="optimizer steps", ge=1)
    eval_iters: int = setting(100, "Batches of each validation; 0 never validates.", unit="global batches", ge=0)
    exit_interval: int | None = setting(
        None, "Save (where `save` is set) and stop when the step is a multiple of this.", unit="optimizer steps", ge=1
    )
    check_replicas_interval: int = setting(
        1000,
        "Steps between comparisons, bit by bit, of all that several processes hold a copy of: weights of data parallel "
        "ranks, unsplit weights of tensor parallel ranks, tied weights of pipeline stages. A difference stops the run "
        "and names the tensor. A comparison reads the weights once. 0 never compares.",
        unit="optimizer steps",
        ge=0,
    )
    most_not_finite: int = setting(
        10,
        "More steps in a row than this whose loss or gradient is not finite, and which change nothing, end the run; "
        "fp16 steps that a smaller loss scale mends do not count. 0 never ends it.",
        unit="optimizer steps",
        ge=0,
    )
    spike_guard: dict[str, Any] | None = setting(
        None,
        "What is done when the loss or the gradient norm is far above its running median: {action: skip, rollback or "
        "stop, ...}. Unset: nothing.",
    )
    checkpoint_activations: bool = setting(
        False, "Compute the blocks' activations again in the backward pass instead of keeping them."
    )
    checkpoint_num_layers: int = setting(
        1, "Blocks that are recomputed together under checkpoint_activations.", unit="layers", ge=1
    )
    checkpoint_operations: list[Literal["norm", "attention", "activation"]] | None = setting(
        None,
        "Recompute only these operations of each block, and not whole blocks: norm (what the block's norms return), "
        "activation (what the MLP's returns), attention (scores, softmax and dropout). No product with weights is "
        "computed twice. norm and activation together save about a third of a block's memory at hardly any time.",
    )
    checkpoint_first_layers: int | None = setting(
        None, "Recompute in this many blocks from the model's start only. Unset: in all.", unit="layers", ge=0
    )
    offload_activations: bool = setting(
        False,
        "Keep what the blocks need for the backward pass in the CPU's memory: it goes there while the next blocks are "
        "computed, and comes back one block ahead.",
    )
    eod_mask_loss: bool = setting(
        False, "Give no loss to the token after an end-of-document token, which belongs to another document."
    )
    char_level_ppl: bool = setting(False, "Report validation perplexity per character as well.")
