"""What the clock asks of a run, with a clock of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.engine.wishes import Wish
from megatron.parallel.mesh import Mesh
from megatron.training.clocks import Clocks
from megatron.training.progress import Progress
from megatron.training.stop import Agreement, stopped, unbegun
from tests.end_to_end.tiny import config


class Clock:
    """The time in seconds, as the test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def steps(self, clocks: Clocks, count: int, seconds: float) -> list[set[Wish]]:
        """Return what is wished in each of `count` steps."""
        found = []
        for _ in range(count):
            self.now += seconds
            found.append(clocks.wishes())
        return found


def clocks(folder: Path, environ: dict[str, str], late: int = 0, **changes: Any) -> tuple[Clock, Clocks]:
    clock = Clock()
    return clock, Clocks(config(folder, **changes), environ, late, clock)


def test_nothing_is_wished_where_nothing_is_asked(tmp_path: Path) -> None:
    clock, found = clocks(tmp_path, {"DEEPY_LAUNCH_TIME": "1"})
    assert clock.steps(found, 3, 1e6) == [set()] * 3
    assert found.wall_seconds is None


def test_the_wall_time_counts_from_the_launch(tmp_path: Path) -> None:
    clock, found = clocks(tmp_path, {"DEEPY_LAUNCH_TIME": "970"}, max_wall_time="0:01:00")
    assert found.wall_seconds == 30
    assert clock.steps(found, 4, 10) == [set(), set(), {Wish.WALL_TIME}, {Wish.WALL_TIME}]
    clock, found = clocks(tmp_path, {}, max_wall_time=1)  # started by hand: from when training begins
    assert clock.steps(found, 3, 30) == [set(), {Wish.WALL_TIME}, {Wish.WALL_TIME}]


def test_a_save_is_wished_until_there_is_one(tmp_path: Path) -> None:
    clock, found = clocks(tmp_path, {}, checkpoint_interval_minutes=1)
    assert clock.steps(found, 4, 20) == [set(), set(), {Wish.SAVE}, {Wish.SAVE}]
    found.saved(3.0)
    assert clock.steps(found, 3, 20) == [set(), set(), {Wish.SAVE}]
    clock, found = clocks(tmp_path, {}, save=None, resume="never", checkpoint_interval_minutes=1)
    assert clock.steps(found, 3, 60) == [set()] * 3


def test_the_end_of_a_slurm_job_leaves_room_for_a_step_and_a_save(tmp_path: Path) -> None:
    clock, found = clocks(tmp_path, {"SLURM_JOB_END_TIME": "2000"}, late=2)
    assert found.margin() == 120  # 2 minutes at the least
    assert clock.steps(found, 3, 30) == [set()] * 3
    found.saved(100.0)
    assert found.margin() == 4 * 30 + 2 * 100
    clock.now = 2000 - 321 - 29
    assert clock.steps(found, 3, 29) == [set(), {Wish.SLURM_END}, {Wish.SLURM_END}]  # 1679, 1708


@pytest.mark.parametrize(("minutes", "wished"), [(0, set()), (1, set()), (2, {Wish.SLURM_END})])
def test_the_margin_may_be_given(tmp_path: Path, minutes: float, wished: set[Wish]) -> None:
    clock, found = clocks(tmp_path, {"SLURM_JOB_END_TIME": "1200"}, slurm_stop_minutes=minutes)
    assert clock.steps(found, 1, 110) == [wished]


def test_a_past_or_senseless_end_is_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in ("900", "soon"):
        clock, found = clocks(tmp_path, {"SLURM_JOB_END_TIME": value})
        assert clock.steps(found, 2, 10) == [set(), set()]
    assert "SLURM_JOB_END_TIME = 900 has passed already" in caplog.text


def test_only_the_first_reason_counts_and_a_save_is_none(tmp_path: Path) -> None:
    agreement = Agreement(Mesh.single())
    agreement.hear({Wish.SAVE})
    assert (agreement.reason, agreement.wants_save) == (None, True)
    agreement.saved(1.0)
    agreement.hear({Wish.SLURM_END, Wish.SIGTERM})
    agreement.hear({Wish.SIGUSR1})
    assert (agreement.reason, agreement.wants_save) == (Wish.SIGTERM, False)


def test_how_it_ends(tmp_path: Path) -> None:
    tiny = config(tmp_path, max_wall_time="0:30:00", requeue_exit_code=99, resume="never")
    begun, later = Progress(iteration=4), Progress(iteration=9)
    assert stopped(tiny, Wish.SIGTERM, begun, later).exit_code == 99
    assert "from which the same command with resume: auto goes on." in stopped(tiny, Wish.SIGTERM, begun, later).text
    nothing = stopped(tiny, Wish.SIGUSR1, begun, begun)
    assert nothing.exit_code == 99
    assert "SIGUSR1 asked for it, before a step was done: nothing is lost" in nothing.text
    for end in (stopped(tiny, Wish.WALL_TIME, begun, begun), unbegun(tiny)):
        assert end.exit_code == 1  # another turn would end like this one
        assert "max_wall_time = 0:30:00 has passed, before a single step was done" in end.text
    unsaved = config(tmp_path, save=None, resume="never")
    assert stopped(unsaved, Wish.SIGUSR1, begun, later).exit_code == 138
    assert stopped(unsaved, Wish.WALL_TIME, begun, later).exit_code == 143
