"""Ranks that no launcher of ours supervises: what happens to the others when one dies or hangs, and what is said."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron import whereabouts
from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.stage import Feed
from megatron.launch.entry import run_worker
from megatron.launch.port import free_port
from megatron.parallel.mesh import Mesh
from megatron.training.run import train
from megatron.whereabouts import Phase, enter, inside
from tests.end_to_end.tiny import write_corpus
from tests.launch.forked import fork
from tests.launch.test_entry import payload
from tests.ranks import preload

Work = Callable[[int, Path], None]


def run(folder: Path, ranks: int, work: Work | None, **keys: object) -> tuple[list[int], list[str], float]:
    """Run `work(rank, folder)` on ranks that plain variables describe, from step 7 on, or train where it is None.

    Returns their exit codes, their outputs, and the seconds it took."""

    def begin(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        dist.barrier()
        whereabouts.begin_step(6)
        whereabouts.begin_step(7)
        enter(Phase.BACKWARD, 3)
        assert work is not None
        work(mesh.world.rank, folder)

    preload()
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(0))}
    argv = payload(folder, ranks, **{"gradient_accumulation_steps": 1, **keys})
    body: Any = train if work is None else begin
    began = time.monotonic()
    forks = [
        fork(lambda: run_worker(body, argv), folder / f"output{rank}", {"RANK": str(rank), **shared})
        for rank in range(ranks)
    ]
    codes = [one.end()[0] for one in forks]
    seconds = time.monotonic() - began
    outputs = [_settled(one.output) for one in forks]
    for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        print(f"----- rank {rank}: {code}\n{output}")
    return codes, outputs, seconds


def _settled(output: Path) -> str:
    """Return what was printed, by the watch of a killed rank too, which outlives it for a moment."""
    text = ""
    while text != (text := output.read_text()):
        time.sleep(0.4)
    return text


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def all_reduce() -> None:
    dist.all_reduce(torch.ones(()))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("dead", "phase", "said"),
    [
        ([0], Phase.FORWARD, "at step 7, in forward"),
        ([0, 1], Phase.VALIDATION, "at step 7, in validation"),
    ],
)
def test_a_killed_rank_ends_the_others(tmp_path: Path, dead: list[int], phase: Phase, said: str) -> None:
    def work(rank: int, folder: Path) -> None:
        enter(phase)
        if rank in dead:
            die()
        threading.Event().wait(60)  # no collective that would notice

    codes, outputs, seconds = run(tmp_path, 3, work)
    assert codes == [-9 if rank in dead else 1 for rank in range(3)]
    assert seconds < 10
    assert sum(f"failed {said}, exit code" in text for text in outputs) == 1
    assert f"failed {said}, exit code" in outputs[dead[0]] + outputs[dead[-1]]
    survivors = [text for rank, text in enumerate(outputs) if rank not in dead]
    assert sum(text.count("because rank") for text in survivors) == 1  # one line for all ranks of a host
    assert all("Traceback" not in text for text in outputs)


def test_a_rank_that_is_killed_before_it_has_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others wait for it to join the groups."""

    def create(*arguments: object) -> Mesh:
        if dist.get_rank() == 1:
            die()
        dist.barrier()
        return Mesh.single()

    monkeypatch.setattr(Mesh, "create", create)
    codes, outputs, seconds = run(tmp_path, 2, lambda rank, folder: None)
    assert codes == [1, -9]
    assert seconds < 10
    assert "failed before its first step, in meeting of the ranks, exit code" in outputs[1]
    assert outputs[0].strip().splitlines()[-1].startswith("rank 0 on host ")


def test_the_traceback_is_shown_once_and_last(tmp_path: Path) -> None:
    """Two ranks fail, and the third sees an error that only tells of it."""

    def work(rank: int, folder: Path) -> None:
        if rank == 1:
            raise ZeroDivisionError("the cause")
        if rank == 2:
            time.sleep(0.1)
        all_reduce()

    codes, outputs, seconds = run(tmp_path, 3, work)
    assert codes == [1, 1, 1]
    assert seconds < 10
    assert outputs[1].strip().splitlines()[-1].startswith("rank 1 of 3 on host ")
    assert outputs[1].count("Traceback") == 1
    assert "Traceback" not in outputs[0] + outputs[2]
    assert "ranks 0, 2 on host" in outputs[0]
    assert outputs[0].strip().endswith("micro-batch 3, in backward (ZeroDivisionError: the cause).")


def test_a_section_of_rank_0_that_raises_reaches_all(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> None:
        with inside(Phase.SAVE):
            if rank == 0:
                raise OSError("no such disk")
            dist.barrier()

    codes, outputs, seconds = run(tmp_path, 2, work)
    assert codes == [1, 1]
    assert seconds < 10
    assert ", in save, exit code 1. The other ranks were stopped." in outputs[0]
    assert outputs[1].count("\n") <= 3
    assert "in save (OSError: no such disk)." in outputs[1]


def test_a_rank_that_never_gives_python_a_turn_is_killed(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> None:
        if rank == 0:
            (folder / "stuck").touch()
            hold_the_interpreter()
        wait_for(folder / "stuck")
        raise ZeroDivisionError("the cause")

    codes, outputs, seconds = run(tmp_path, 2, work)
    assert codes == [-9, 1]
    assert seconds < 10
    assert "rank 0 on host" in outputs[0]


def sleep() -> None:
    time.sleep(60)


def hold_the_interpreter() -> None:
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    while True:
        library.pthread_mutex_lock(mutex)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("stuck", "said", "frame"),
    [
        (hold_the_interpreter, "is in batch of step 7, for ", "in hold_the_interpreter\n"),
        (stop, "is in batch of step 7 and is stopped (by SIGSTOP", "no stack: the process is stopped"),
    ],
)
def test_a_run_that_hangs_is_ended(tmp_path: Path, stuck: Callable[[], None], said: str, frame: str) -> None:
    def work(rank: int, folder: Path) -> None:
        if rank == 1:
            enter(Phase.BATCH)
            stuck()
        all_reduce()

    codes, outputs, _ = run(tmp_path, 3, work, hang_timeout_minutes=0.02)
    assert [abs(code) in (1, 9) for code in codes] == [True] * 3
    report = outputs[0][outputs[0].index("The run hangs") :]
    line = report.splitlines()[1]
    assert line.startswith("ranks 0, 2 wait in all_reduce, in backward of step 7 micro-batch 3; rank 1 (host ")
    assert said in line
    assert frame in report
    assert report.index("Rank 1 on host") < report.index("Rank 0 on host")
    assert "in all_reduce\n" in report
    assert "The run hangs" not in outputs[1] + outputs[2]


def test_a_rank_that_leaves_a_collective_out(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> None:
        if rank == 0:
            dist.broadcast(torch.ones(4), 1)
        whereabouts.begin_step(8)
        dist.barrier() if rank else None

    codes, outputs, _ = run(tmp_path, 2, work, hang_timeout_minutes=0.015)
    assert codes == [1, 1]
    assert "rank 0 waits in broadcast, in backward of step 7 micro-batch 3" in outputs[0]
    assert "rank 1 waits in barrier, in batch of step 8" in outputs[0]
    assert "one of them has left a collective out" in outputs[0]


def test_a_stage_of_a_pipeline_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run, in which the second stage sleeps in the forward pass of step 2, micro-batch 1."""
    write_corpus(tmp_path / "corpus")
    take = Feed.take

    def sleep_over(feed: Feed) -> Batch:
        place = whereabouts.current()
        if dist.get_rank() == 1 and (place.step, place.micro_batch) == (2, 1):
            sleep()
        return take(feed)

    monkeypatch.setattr(Feed, "take", sleep_over)
    keys = {"gradient_accumulation_steps": 2, "pipe_parallel_size": 2, "save": None, "resume": "never"}
    codes, outputs, _ = run(tmp_path, 2, None, hang_timeout_minutes=0.02, eval_iters=0, **keys)
    assert codes == [1, 1]
    report = outputs[0][outputs[0].index("The run hangs") :]
    line = report.splitlines()[1]
    assert line.startswith("rank 0 waits in ")
    assert " in receive gradient of step 2 micro-batch 1; rank 1 (host " in line
    assert ") is in forward of step 2 micro-batch 1, for " in line
    assert "in sleep\n" in report


def test_slow_steps_are_no_hang(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> None:
        for step in range(8, 11):
            whereabouts.begin_step(step)
            time.sleep(0.7)
            all_reduce()

    codes, outputs, seconds = run(tmp_path, 2, work, hang_timeout_minutes=0.025)
    assert codes == [0, 0]
    assert seconds > 2.1
    assert "hangs" not in "".join(outputs)


def test_the_watch_leaves_nothing_behind(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> None:
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        (folder / f"guardian{rank}").write_text(" ".join(children))
        names = [Path(f"/proc/{child}/comm").read_text().strip() for child in children]
        assert names == ["deepy-watch"]
        child = os.fork()
        if child == 0:  # a worker that the run forks is not watched, and its end is no death
            os._exit(0)
        os.waitpid(child, 0)

    codes, outputs, _ = run(tmp_path, 2, work)
    assert codes == [0, 0]
    assert not [line for line in "".join(outputs).splitlines() if "ends" in line or "warning" in line]
    for rank in range(2):
        assert not Path("/proc", (tmp_path / f"guardian{rank}").read_text()).exists()


def test_the_end_of_the_watch_itself_ends_the_run(tmp_path: Path) -> None:
    """Of both: the rank beside it, and those that were connected with it."""

    def work(rank: int, folder: Path) -> None:
        if rank == 0:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        threading.Event().wait(60)

    codes, outputs, seconds = run(tmp_path, 2, work)
    assert codes == [1, 1]
    assert seconds < 10
    assert "ends because its watch (the process deepy-watch) was killed." in outputs[0]
    assert "ends at step 7 because the machine or the watch of rank 0 is gone." in outputs[1]


def test_a_single_process_that_hangs_is_ended(tmp_path: Path) -> None:
    codes, outputs, _ = run(tmp_path, 1, lambda rank, folder: sleep(), hang_timeout_minutes=0.015)
    assert codes == [1]
    assert "rank 0 (host " in outputs[0]
    assert "in sleep\n" in outputs[0]


def test_strangers_are_sent_away() -> None:
    import socket

    from megatron.launch.guardian import _HubServer
    from megatron.launch.hub import Waits
    from megatron.launch.link import Link, listen
    from megatron.launch.place import Place

    listening = listen()
    server = _HubServer(Place(0, 2, 0, 2), listening, "secret", None, Waits())
    for word in (b'{"hello": "wrong", "rank": 1, "host": "x"}\n', b"GET / HTTP/1.1\n\n", b"7\n", b"x" * 5000):
        guest = socket.create_connection(("127.0.0.1", listening.getsockname()[1]))
        guest.sendall(word)
        deadline = time.monotonic() + 5
        link = Link(guest)
        while link.is_open and time.monotonic() < deadline:
            server.serve()
            link.messages()
        assert not link.is_open
    assert server.is_done()
    listening.close()
