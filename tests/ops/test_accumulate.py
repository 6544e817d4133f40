"""Sums of gradients equal those of converted copies, to the last bit."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.accumulate import accumulate


@pytest.mark.parametrize("part_dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_gradients_takes_parts_of_any_dtype(part_dtype):
    total, parts = torch.full((3, 2**17 + 5), torch.nan), [torch.randn(3, 2**17 + 5).to(part_dtype) for _ in range(3)]
    for number, part in enumerate(parts):
        accumulate(total, part, is_first=number == 0)
    assert torch.equal(total, (parts[0].float() + parts[1].float()) + parts[2].float())
