from __future__ import annotations

import math

import pytest
import torch

from megatron.ops.relative import alibi_slopes, relative_buckets


def test_slopes_of_a_power_of_two_are_geometric() -> None:
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    torch.testing.assert_close(alibi_slopes(1), torch.tensor([2.0**-8]))


def test_slopes_of_other_numbers_come_from_the_powers_around_them() -> None:
    slopes = alibi_slopes(12)
    torch.testing.assert_close(slopes[:8], alibi_slopes(8))
    torch.testing.assert_close(slopes[8:], alibi_slopes(16)[0::2][:4])


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 16), (32, 128), (6, 40)])
def test_buckets_equal_their_formula(num_buckets: int, max_distance: int) -> None:
    exact = num_buckets // 2

    def bucket(distance: int) -> int:
        distance = max(distance, 0)
        if distance < exact:
            return distance
        share = math.log(distance / exact) / math.log(max_distance / exact)
        return min(num_buckets - 1, exact + int(share * (num_buckets - exact) + 1e-6))

    distances = torch.arange(-3, 3 * max_distance)
    assert relative_buckets(distances, num_buckets, max_distance).tolist() == [bucket(int(d)) for d in distances]
