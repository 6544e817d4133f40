"""Durations as a person writes them for Slurm: minutes as a number, "HH:MM:SS", "D-HH:MM:SS"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron.config.draft import Draft
from megatron.errors import Problem

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)\Z")
_DAYS = re.compile(r"(\d+)-(\d+)(?::([0-5]?\d))?\Z")
FORMS = 'minutes as a number, or "HH:MM:SS" or "D-HH:MM:SS" in quotes'


def seconds_of(duration: float | str) -> float:
    """Return a duration in seconds. duration: minutes, or text: "90", "1:30:00", "2-12:00:00", "2-12", "2-12:30".

    Raises ValueError, which says what it is, for anything else; "1:30" among them, which Slurm takes for minutes and
    seconds, and most people for hours and minutes."""
    seconds = _from_text(duration.strip()) if isinstance(duration, str) else 60.0 * duration
    if seconds <= 0:
        raise ValueError("it must be more than 0.")
    return seconds


def _from_text(text: str) -> float:
    if clock := _CLOCK.match(text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return 86400.0 * days + 3600 * hours + 60 * minutes + seconds
    if parts := _DAYS.match(text):
        days, hours, minutes = (int(part or 0) for part in parts.groups())
        return 86400.0 * days + 3600 * hours + 60 * minutes
    try:
        return 60.0 * float(text)
    except ValueError:
        raise ValueError(f"it is none of {FORMS}.") from None


def wall_time_is_a_duration(d: Draft) -> Iterator[Problem]:
    """A limit that cannot be read would never be kept."""
    if d.max_wall_time is None:
        return
    try:
        seconds_of(d.max_wall_time)
    except ValueError as error:
        fix = 'Write max_wall_time: "4:00:00" for four hours, or max_wall_time: 240'
        yield d.problem("max_wall_time", d.max_wall_time, str(error), fix)
