from __future__ import annotations

import mmap
import os
import signal
import time
import timeit

import pytest

from megatron import whereabouts
from megatron.whereabouts import RECORD_BYTES, Phase, Position, enter, inside


def test_words() -> None:
    assert str(whereabouts.current()) == "start-up before the first step"
    enter(Phase.DATA_INDEX)
    assert str(whereabouts.current()) == "building of the data index before the first step"
    whereabouts.begin_step(197)
    assert (str(whereabouts.current()), whereabouts.current().doing()) == ("batch of step 197", "in batch")
    enter(Phase.BACKWARD, 3)
    assert str(whereabouts.current()) == "backward of step 197 micro-batch 3"
    assert whereabouts.current().doing() == "micro-batch 3, in backward"


def test_what_is_entered_within_is_part_of_it_and_an_error_leaves_the_place() -> None:
    whereabouts.begin_step(4)
    with inside(Phase.VALIDATION):
        assert str(whereabouts.current()) == "validation after step 4"
        enter(Phase.FORWARD, 1)
        assert str(whereabouts.current()) == "forward of the validation after step 4 micro-batch 1"
        assert whereabouts.current().doing() == "micro-batch 1, in forward of the validation"
    assert str(whereabouts.current()) == "batch of step 4"
    with pytest.raises(OSError, match="disk"), inside(Phase.SAVE):
        raise OSError("disk")
    assert str(whereabouts.current()) == "save after step 4"


def test_order_is_that_of_a_step() -> None:
    places = [Position(Phase.SAVE), Position(Phase.BATCH, 1), Position(Phase.FORWARD, 1, 0)]
    places += [Position(Phase.BACKWARD, 1, 0), Position(Phase.FORWARD, 1, 1), Position(Phase.UPDATE, 1)]
    places += [Position(Phase.FORWARD, 1, 0, Phase.VALIDATION), Position(Phase.BATCH, 2)]
    assert places[2].order < places[3].order < places[4].order
    assert sorted(places, key=lambda place: place.order)[0] is places[0]
    assert sorted(places, key=lambda place: place.order)[-1] is places[-1]


def test_clocks() -> None:
    enter(Phase.MODEL)
    place = whereabouts.current()
    assert place.seconds(place.since + 3) == 3
    assert abs(place.wall_clock() - time.time()) < 5
    moved = Position.from_dict(place.as_dict(now=place.since + 3), now=100.0)
    assert (moved.phase, moved.changes, moved.seconds(100.0)) == (Phase.MODEL, place.changes, 3)


def test_the_place_of_a_killed_process_can_be_read_and_its_children_do_not_overwrite_it() -> None:
    shared = mmap.mmap(-1, 2 * RECORD_BYTES)
    assert whereabouts.read(shared, RECORD_BYTES) is None
    pid = os.fork()
    if pid == 0:
        whereabouts.keep_in(shared, RECORD_BYTES)
        whereabouts.begin_step(9)
        enter(Phase.BACKWARD, 2)
        child = os.fork()
        if child == 0:
            whereabouts.begin_step(1000)
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    found = whereabouts.read(shared, RECORD_BYTES)
    assert found is not None
    assert str(found) == "backward of step 9 micro-batch 2"
    assert whereabouts.read(shared, 0) is None


def test_a_mark_costs_less_than_two_microseconds() -> None:
    """0.3 us were measured on a quiet core; others share the processor of a test."""
    seconds = min(timeit.repeat(lambda: enter(Phase.FORWARD, 3), number=2000, repeat=20)) / 2000
    assert seconds < 2e-6
