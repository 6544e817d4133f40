"""Worker processes whose answers come in the order of the questions, and of which none that dies is waited for.

    for answer in ordered(encode, chunks, num_workers=8): ...

Each worker has a pipe of its own, so that one that is killed in the middle of an answer ends its pipe, and the reader
knows. (A ProcessPoolExecutor has one pipe for all: the rest of a half-written answer is awaited for ever.)
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

QUEUED = 2
"""Questions that a worker holds at once, so that it never waits for the next one."""
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class WorkerDiedError(Exception):
    """A worker ended before it had answered."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    questions: int = 0


@dataclass(frozen=True)
class _Failure:
    error: Exception


@dataclass(frozen=True)
class _Reply(Generic[Answer]):
    number: int
    content: Answer | _Failure


def ordered(
    function: Callable[[Question], Answer], questions: Iterable[Question], num_workers: int
) -> Generator[Answer, None, None]:
    """Yield function(question) of each question, in their order, computed by forked processes.

    Never more than 3 questions for each worker are ahead of the reader. What `function` raises is raised at its turn.
    The workers end with the generator, answered or not. Raises WorkerDiedError where one was killed.
    """
    workers = [_start(function) for _ in range(num_workers)]
    try:
        yield from _ordered(workers, enumerate(questions))
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def _start(function: Callable[[Any], Any]) -> _Worker:
    """Fork a worker, which inherits the function and all that it holds."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function, os.getpid()), daemon=True)
    process.start()
    there.close()  # the worker's is the only other end
    return _Worker(process, here)


def _ordered(workers: list[_Worker], questions: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    answers: dict[int, Any] = {}
    turn = asked = 0
    while True:
        while asked - turn < 3 * len(workers):
            worker = min(workers, key=lambda each: each.questions)
            question = next(questions, None) if worker.questions < QUEUED else None
            if question is None:
                break
            _send(worker, question)
            asked += 1
        if turn == asked:
            return
        while turn not in answers:
            busy = {each.connection: each for each in workers if each.questions}
            for connection in wait(list(busy)):
                reply = _receive(busy[connection])  # type: ignore[index]
                answers[reply.number] = reply.content
        answer = answers.pop(turn)
        turn += 1
        if isinstance(answer, _Failure):
            raise answer.error
        yield answer


def _send(worker: _Worker, question: tuple[int, Any]) -> None:
    try:
        worker.connection.send(question)
    except OSError as error:
        raise WorkerDiedError from error
    worker.questions += 1


def _receive(worker: _Worker) -> _Reply[Any]:
    try:
        reply: _Reply[Any] = worker.connection.recv()
    except (EOFError, OSError) as error:
        raise WorkerDiedError from error
    worker.questions -= 1
    return reply


def _serve(connection: Connection, function: Callable[[Any], Any], parent: int) -> None:
    """In a worker: answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    with suppress(EOFError, OSError):
        while True:
            number, question = connection.recv()
            try:
                content = function(question)
            except Exception as error:
                content = _Failure(error)
            connection.send(_Reply(number, content))


def _end_with(parent: int) -> None:
    """Ask the system to end this worker when its parent is killed, instead of letting it wait for work for ever."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
