"""The checkpoint benchmark: both sides give back what was saved, and every figure is measured."""

import pytest
import torch

from benchmarks.checkpoint import AIMS, Sides, make_state, measure


def test_all_figures_are_measured(tmp_path):
    found = measure(tmp_path, layers=1, rounds=2, cold=True, width=64)
    assert AIMS.keys() <= found.keys()
    assert len(found["rounds"]) == 2
    assert found["gigabytes"] == pytest.approx(1e-9 * 14 * (8 * 64 * 64 + 64))
    assert all(value > 0 for turn in found["rounds"] for value in turn.values() if isinstance(value, float))
    assert found["async_written_seconds"] > found["async_blocked_seconds"] > 0
    assert 1.0 < found["reshard_bytes_read_per_byte_kept"] < 2.5


def test_a_side_that_gives_back_something_else_is_found(tmp_path):
    sides = Sides(tmp_path, make_state(1, 16))
    sides.save_theirs()
    sides.save_ours()
    sides.load_ours()
    sides.reshard()
    sides.require_the_same()
    sides.shares["layers.0.down", "master"][0, 0] += 1
    with pytest.raises(AssertionError):
        sides.require_the_same()
    torch.testing.assert_close(sides.targets["layers.0.up", "weight"], sides.state["layers.0.up", "weight"])
