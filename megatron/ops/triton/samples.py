"""Every operation at sizes that training meets; a kernel file adds its `samples()` here."""

from __future__ import annotations

from megatron.ops.triton import norms
from megatron.ops.triton.launch import Sample

SAMPLES: tuple[Sample, ...] = (*norms.samples(),)
