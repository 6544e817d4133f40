"""Attention as operations that can be computed in several ways: one for each set of features of a model's layers."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from megatron.ops import probes
from megatron.ops.choice import EAGER, Candidate, Operation

FEATURES = ("window", "documents", "alibi", "bias", "dropout")
"""What attention of a model may have, beyond causality."""

_OF_PYTORCH = ("cudnn", "flash", "efficient")


def attention_operation(features: Collection[str]) -> Operation:
    """Return attention with some of FEATURES: "attention", or for example "attention window alibi"."""
    present = [feature for feature in FEATURES if feature in features]
    kernels = {"documents", "window", "alibi"} & set(present) and not {"bias", "dropout"} & set(present)
    return Operation(
        " ".join(["attention", *present]),
        "megatron.ops.attention:sight_reference",
        (
            Candidate("sdpa", "megatron.ops.attention_sdpa:SDPA", device=""),
            Candidate("triton", "megatron.ops.triton.attention:BACKEND", "triton"),
            Candidate("flash3", "megatron.ops.attention_flash:FLASH3", "flash_attn_interface"),
            Candidate("flash2", "megatron.ops.attention_flash:FLASH2", "flash_attn"),
            *(Candidate(name, f"megatron.ops.attention_sdpa:{name.upper()}", "torch") for name in _OF_PYTORCH),
            Candidate("cpp", "megatron.ops.cpu.attention:CPP", "", "megatron.ops.cpu.library:make_ready", "cpu"),
            Candidate("dense", "megatron.ops.attention_dense:DENSE", device=""),
        ),
        partial(probes.attention, features=present),
        "triton" if kernels else EAGER,
    )


ATTENTION = tuple(attention_operation(features) for features in ((), *((feature,) for feature in FEATURES)))
