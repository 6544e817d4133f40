"""A plan is for GPUs: what only a CPU does otherwise is off while it is compared with live engines."""

import pytest

from megatron.ops.heads import split_heads_reference


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """PyTorch's attention, heads that are not copied apart, and no kernels for a CPU."""
    monkeypatch.setattr("megatron.ops.cpu.library.make_ready", lambda device: "a plan is for GPUs")
    monkeypatch.setattr("megatron.ops.attention_sdpa._fits_blocks", lambda *_: False)
    monkeypatch.setattr("megatron.model.attention.split_heads", split_heads_reference)
