"""DeepSpeed's own blocks, with the names that they have in a DeepSpeed configuration."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section, setting


class DeepspeedConfig(Section):
    """What the training engine is told beyond the keys of the other sections."""

    fp16: dict[str, Any] | None = setting(
        None,
        "DeepSpeed's fp16 block: loss_scale (0 is dynamic), initial_scale_power, loss_scale_window, hysteresis, "
        "min_loss_scale. Used with precision fp16.",
    )
    bf16: dict[str, Any] | None = setting(None, "DeepSpeed's bf16 block. Used with precision bf16.")
    data_types: dict[str, Any] | None = setting(
        None, "{grad_accum_dtype}: what gradients are accumulated in. Unset: fp32, always."
    )
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = setting(
        None, "What gradients are reduced in over data parallel processes. Unset: fp32, always."
    )
    prescale_gradients: bool = setting(False, "Divide gradients before they are reduced instead of after.")
    gradient_predivide_factor: float = setting(
        1.0, "With prescale_gradients: the part of the division that is done before.", unit="ratio", gt=0
    )
    wall_clock_breakdown: bool = setting(False, "Let DeepSpeed time forward, backward and step; it waits for the GPU.")
    dump_state: bool = setting(False, "Let DeepSpeed print its state when it starts.")
    flops_profiler: dict[str, Any] | None = setting(None, "DeepSpeed's flops_profiler block.")
    comms_logger: dict[str, Any] | None = setting(None, "DeepSpeed's comms_logger block.")
    deepspeed_extra_args: dict[str, Any] | None = setting(
        None, "More keys for DeepSpeed, none of which the other keys already decide."
    )
