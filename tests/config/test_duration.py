"""Durations as Slurm's users write them."""

from __future__ import annotations

import pytest

from megatron.config.duration import seconds_of
from megatron.config.resolve import resolve
from tests.end_to_end.tiny import settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 5400), (0.5, 30), ("90", 5400), ("1.5", 90), ("0:00:02", 2), ("04:30:00", 16200), ("100:00:00", 360000),
        ("2-12:00:00", 216000), ("1-0:0:1", 86401), ("2-12", 216000), ("2-12:30", 217800), (" 1:00:00 ", 3600),
    ],
)  # fmt: skip
def test_what_is_understood(text: float | str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["1:30", "1:60:00", "soon", "1h", "-5", "0:00:00", -1, 0, "1-", ""])
def test_what_is_refused(text: float | str) -> None:
    with pytest.raises(ValueError, match=r"^it (is none of|must be more than)"):
        seconds_of(text)


def test_a_config_takes_numbers_and_text(tmp_path) -> None:
    for value in (240, 0.5, "4:00:00"):
        assert resolve(settings(tmp_path, max_wall_time=value), 1).stopping.max_wall_time == value


def test_an_interval_in_minutes_says_when_to_save(tmp_path) -> None:
    keys = settings(tmp_path, checkpoint_factor=None, checkpoint_interval_minutes=30)
    assert resolve(keys, 1).checkpoint.checkpoint_interval_minutes == 30
