"""Worker processes: order, failures at their turn, and no waiting for the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from megatron.data.workers import WorkerDiedError, ordered


def uneven(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number, os.getpid()


def test_answers_come_in_the_order_of_the_questions_from_all_workers() -> None:
    answers = list(ordered(uneven, range(40), 3))
    assert [number for number, _ in answers] == list(range(40))
    assert len({process for _, process in answers} - {os.getpid()}) == 3
    assert not multiprocessing.active_children()


def test_few_questions_are_read_ahead() -> None:
    read: list[int] = []

    def questions() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    answers = ordered(uneven, questions(), 2)
    for number in range(50):
        next(answers)
        assert len(read) <= number + 1 + 3 * 2
    answers.close()
    assert not multiprocessing.active_children()


def test_a_failure_is_raised_at_its_turn() -> None:
    def fail(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        time.sleep(0.02)
        return number

    answers = ordered(fail, range(9), 4)
    assert [next(answers) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five"):
        next(answers)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("victim", ["in the middle of an answer", "while it works"])
def test_a_killed_worker_is_known_at_once(victim: str) -> None:
    def answer(number: int) -> bytes:
        if victim == "while it works":
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(1 << 26)  # more than a pipe takes, so that the worker waits for the reader

    answers = ordered(answer, range(8), 2)
    begin = time.monotonic()

    def read_and_kill() -> None:
        for _ in answers:
            time.sleep(0.2)
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(WorkerDiedError):
        read_and_kill()
    assert time.monotonic() - begin < 20
    assert not multiprocessing.active_children()


def test_a_reader_that_stops_waits_for_nobody() -> None:
    def answer(number: int) -> bytes:
        return bytes(1 << 26)

    answers = ordered(answer, range(8), 2)
    next(answers)
    time.sleep(0.2)  # both workers are in the middle of an answer
    answers.close()
    assert not multiprocessing.active_children()
