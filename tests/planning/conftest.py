"""A plan is for GPUs: what only a CPU does otherwise is off while it is compared with live engines."""

import pytest

from megatron.ops.heads import split_heads_reference


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """PyTorch's attention, and heads that are not copied apart."""
    monkeypatch.setattr("megatron.ops.attention_sdpa._fits_blocks", lambda *_: False)
    monkeypatch.setattr("megatron.model.attention.split_heads", split_heads_reference)
