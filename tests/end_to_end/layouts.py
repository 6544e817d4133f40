"""A run that changes its layout on the way, against the same run of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_resume import run
from tests.end_to_end.tiny import losses, tensors
from tests.ranks import run_ranks


def assert_the_same_run(
    whole: Path, broken: Path, model: dict[str, Any], layouts: list[tuple[int, int, dict[str, Any]]]
) -> None:
    """Run the tiny run whole in one process, and broken in `layouts`; compare every loss and the whole final state.

    whole, broken: folders with a corpus. model: keys of both. layouts: processes, the step to stop after, and keys.
    """
    run_ranks(1, lambda: run(whole, **model))
    for world_size, last, changes in layouts:
        run_ranks(world_size, functools.partial(run, broken, world_size, exit_interval=last, **model, **changes))
    assert losses(broken).keys() == losses(whole).keys()
    for kind in ("step", "validation"):
        for iteration, loss in losses(whole, kind).items():
            assert losses(broken, kind)[iteration] == pytest.approx(loss, rel=1e-5), (kind, iteration)
    expected, found = tensors(whole), tensors(broken)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, key
