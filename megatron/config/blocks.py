"""The entries of DeepSpeed's blocks and of the optimizer block, typed: a misspelt entry never reaches the engine.

Each block of the schema is a plain dict; here is what may stand in it. Names, defaults and ranges are those
of DeepSpeed 0.19.8, except where a comment says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["fp32", "fp16", "bf16"]


class Block(BaseModel):
    """A block of a key; entries that are not set stay out of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """Return the entries that were set, in canonical form."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


def entry(default: Any, description: str, *, unit: str | None = None, **constraints: Any) -> Any:
    """Return the pydantic field of an entry of a block of our own; arguments as in `schema.base.setting`."""
    return Field(default, description=description, json_schema_extra={"unit": unit} if unit else {}, **constraints)


class Offload(Block):
    """offload_optimizer and offload_param: what is kept outside the GPU; DeepSpeed's own entries pass through."""

    model_config = ConfigDict(extra="allow")

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    pin_memory: bool = False


class ZeroOptimization(Block):
    """zero_optimization."""

    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0)
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, ge=0)
    use_multi_rank_bucket_allreduce: bool = True
    overlap_comm: bool = False  # DeepSpeed's own default is true for stage 3; it has raced in several releases
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
    cpu_offload: bool | None = None
    sub_group_size: int = Field(1_000_000_000, ge=0)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0)
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = Field(0, ge=0)
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: int = Field(1, ge=0)
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = False  # true replaces F.linear for the whole process; ours keeps no weight anyway
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: dict[str, Any] | None = None


class Fp16(Block):
    """fp16: loss scaling. `fp16: true` is GPT-NeoX's second spelling of `enabled: true`."""

    enabled: bool | None = None
    fp16: bool | None = None
    type: Literal["fp16", "bfloat16"] | None = None
    auto_cast: bool = False
    loss_scale: float = Field(0, ge=0)
    initial_scale_power: int = Field(16, ge=0)
    loss_scale_window: int = Field(1000, ge=1)
    hysteresis: int = Field(2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: int = Field(1, ge=1)
    fp16_master_weights_and_grads: bool = False


class Bf16(Block):
    """bf16."""

    enabled: bool | None = None
    immediate_grad_update: bool = True  # add to the fp32 sum at once, so that no bf16 gradient outlives its layer
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class DataTypes(Block):
    """data_types."""

    grad_accum_dtype: DType = "fp32"


class OptimizerParams(Block):
    """optimizer.params of every optimizer that can be named; which of them takes which entry is in `OPTIMIZERS`."""

    lr: float = Field(gt=0)
    betas: list[float] | None = Field(None, min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    beta: float = Field(0.0, ge=0, lt=1)


class Optimizer(Block):
    """optimizer."""

    type: Literal["adam", "adamw", "cpu_adam", "cpu_torch_adam", "sgd", "lion", "madgrad_wd", "sm3"] = "adam"
    params: OptimizerParams


class SpikeGuard(Block):
    """spike_guard: which losses and gradient norms are spikes, and what is done about one."""

    action: Literal["skip", "rollback", "stop"] = entry(
        ...,
        "skip: leave the update of the step out. rollback: go back to the last checkpoint, and on behind the samples "
        "of the spike. stop: leave the update out, save a checkpoint, and end the run with an error.",
    )
    loss_deviations: float = entry(
        8.0,
        "A loss is a spike this far above the running median; a deviation is 1.4826 times the median distance from the "
        "median. 0 does not watch the loss.",
        unit="robust standard deviations",
        ge=0,
    )
    least_rise: float = entry(
        0.3, "A loss less than this above the running median is never a spike.", unit="nats per token", ge=0
    )
    grad_norm_multiple: float = entry(
        0.0,
        "A gradient norm, before clipping, is a spike above this times the running median. 0 does not watch the norm.",
        unit="ratio",
        ge=0,
    )
    window: int = entry(
        100, "Steps that the medians are of: the last that were applied.", unit="optimizer steps", ge=8, le=10_000
    )
    warmup_steps: int = entry(
        50, "Steps that must be in the window before anything is a spike.", unit="optimizer steps", ge=8, le=10_000
    )
    most_in_a_row: int = entry(
        5,
        "More spikes in a row than this end the run (rollback: more returns to the same checkpoint): it does not help.",
        unit="spikes",
        ge=1,
    )


OPTIMIZERS: dict[str, frozenset[str]] = {
    # what `params` may hold beside lr and weight_decay
    **dict.fromkeys(("adam", "adamw", "cpu_adam", "cpu_torch_adam"), frozenset({"betas", "eps"})),
    "sgd": frozenset({"momentum", "nesterov"}),
    "lion": frozenset({"betas"}),
    "madgrad_wd": frozenset({"momentum", "eps"}),
    "sm3": frozenset({"momentum", "beta", "eps"}),
}

BLOCKS: dict[str, type[Block]] = {
    "zero_optimization": ZeroOptimization,
    "fp16": Fp16,
    "bf16": Bf16,
    "data_types": DataTypes,
    "optimizer": Optimizer,
    "spike_guard": SpikeGuard,
}
