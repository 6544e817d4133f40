"""Every operation at sizes that training meets; a kernel file adds its `samples()` here."""

from __future__ import annotations

from megatron.ops.triton import (
    activations,
    adamw,
    attention,
    cross_entropy,
    dropout_add,
    fp8,
    grouped_matmul,
    norms,
    rotary,
    scan,
    softmax,
)
from megatron.ops.triton.launch import Sample

SAMPLES: tuple[Sample, ...] = (
    *norms.samples(),
    *activations.samples(),
    *rotary.samples(),
    *dropout_add.samples(),
    *softmax.samples(),
    *attention.samples(),
    *cross_entropy.samples(),
    *adamw.samples(),
    *grouped_matmul.samples(),
    *scan.samples(),
    *fp8.samples(),
)
