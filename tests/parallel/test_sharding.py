from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.parallel.sharding import ShardSpec, get_spec, local_shape, merge, set_spec, split


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("spec", [ShardSpec(), ShardSpec(0), ShardSpec(1), ShardSpec(0, blocks=2)])
def test_merge_is_the_inverse_of_split(spec: ShardSpec, size: int) -> None:
    full = torch.arange(12 * 6).view(12, 6)
    pieces = [split(full, spec, size, rank) for rank in range(size)]
    assert all(tuple(piece.shape) == local_shape(full.shape, spec, size) for piece in pieces)
    assert torch.equal(merge(pieces, spec), full)


def test_blocks_are_split_each_on_its_own() -> None:
    value_and_gate = torch.tensor([1, 2, 3, 4, 10, 20, 30, 40])
    assert split(value_and_gate, ShardSpec(0, blocks=2), size=2, rank=1).tolist() == [3, 4, 30, 40]


def test_a_dim_that_does_not_split_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dim 0 of \(6,\) does not split into 2 x 2"):
        split(torch.arange(6), ShardSpec(0, blocks=2), size=2, rank=0)


def test_a_spec_stays_with_its_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert get_spec(parameter) == ShardSpec()
    set_spec(parameter, ShardSpec(0))
    assert get_spec(parameter) == ShardSpec(0)
    assert parameter.tensor_model_parallel is True
    set_spec(parameter, ShardSpec(sequence_partial=True))
    assert parameter.tensor_model_parallel is False
