"""What is said of a run that hangs, and when; the ranks of a supervised run are forked from a Python without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.launch import stacks
from megatron.launch.hang import Seen, Stillness, headline, missing, report, warning
from megatron.launch.stacks import Doing
from megatron.whereabouts import Phase, Position
from tests.launch.test_supervise import finish

BACKWARD = Position(Phase.BACKWARD, 197, 3, changes=9)
IN_SUM = Doing(waits_in="all_reduce", stack='  File "c10d.py", line 5 in all_reduce')
IN_SLEEP = Doing(stack='  File "loader.py", line 7 in read')


def seen(rank: int, position: Position = BACKWARD, doing: Doing = IN_SUM) -> Seen:
    return Seen(rank, f"n{rank // 4 + 1}", position, doing)


def test_the_rank_that_is_in_no_collective_is_missing() -> None:
    ranks = [*map(seen, range(7)), seen(7, Position(Phase.BATCH, 197), IN_SLEEP)]
    assert headline(ranks, 312) == (
        "ranks 0-6 wait in all_reduce, in backward of step 197 micro-batch 3; "
        "rank 7 (host n2) is in batch of step 197, for 312 s"
    )
    said = report(ranks, 312)
    assert said.startswith("The run hangs: no rank has made progress for 312 s.\nranks 0-6 wait in")
    assert said.index("Rank 7 on host n2, which the others wait for") < said.index("Rank 0 on host n1, which waits")
    assert said.count("the innermost call first") == 2
    assert '  File "loader.py", line 7 in read\n' in said


def test_a_stopped_rank_is_missing_wherever_it_is() -> None:
    ranks = [seen(0), seen(1, doing=Doing("stopped (by SIGSTOP)")), seen(2, doing=IN_SLEEP)]
    assert [rank.rank for rank in missing(ranks)] == [1]
    assert "rank 1 (host n1) is in backward of step 197 micro-batch 3 and is stopped (by SIGSTOP), for 5 s" in headline(
        ranks, 5
    )
    assert "no stack: the process is stopped (by SIGSTOP)" in report(ranks, 5)


def test_without_collectives_to_be_seen_the_rank_that_is_behind_is_missing() -> None:
    ranks = [seen(0, doing=IN_SLEEP), seen(1, Position(Phase.FORWARD, 197, 3), IN_SLEEP)]
    assert [rank.rank for rank in missing(ranks)] == [1]
    assert missing([seen(0), seen(1)]) == []
    assert [rank.rank for rank in missing([seen(0)])] == [0]


def test_ranks_in_different_collectives_are_not_judged() -> None:
    ranks = [seen(0), seen(1, Position(Phase.BATCH, 198), Doing(waits_in="barrier"))]
    assert headline(ranks, 5).endswith(
        "rank 1 waits in barrier, in batch of step 198; they do not wait for the same thing, so one of them has left a "
        "collective out"
    )
    assert report(ranks, 5).count("which waits (the innermost") == 2


def moves(still: Stillness, seconds: float, position: Position, begin: float = 0.0) -> list[str]:
    """Look every 0.5 s at one rank that stands still; return what was found, in order."""
    found = [still.look({0: position}, begin + 0.5 * tick) for tick in range(int(2 * seconds) + 1)]
    return [word for word in found if word]


def test_when_it_is_a_hang() -> None:
    later = Position(Phase.FORWARD, 6, 0, changes=20)
    still = Stillness(60)
    still.look({0: Position(Phase.BATCH, 5, changes=10)}, 0)
    assert moves(still, 59, later) == ["warning"]
    assert moves(still, 59, Position(Phase.BACKWARD, 6, 0, changes=21), 60) == ["warning"]  # it moved in time
    assert moves(still, 61, Position(Phase.BACKWARD, 6, 0, changes=22), 120)[:2] == ["warning", "hang"]
    assert moves(Stillness(None), 1000, later) == []


@pytest.mark.parametrize(
    "place",
    [
        Position(Phase.DATA_INDEX, changes=1),
        Position(Phase.FORWARD, 5, 0, changes=9),
        Position(Phase.SAVE, 9, outer=Phase.SAVE, changes=9),
    ],
)
def test_what_takes_long_is_given_twice_the_time(place: Position) -> None:
    still = Stillness(60)
    still.look({0: Position(Phase.BATCH, 5, changes=5)}, 0)
    assert moves(still, 119, place) == ["warning"]
    assert "hang" in moves(still, 121, place, 120)


def test_a_suspended_machine_does_not_hang() -> None:
    still = Stillness(60)
    for now in (0, 1, 2, 100_000, 100_001):
        assert still.look({0: BACKWARD}, now) == ""
    assert still.idle < 10
    assert warning([seen(0)], still).startswith("[warning] No rank has made progress for 8 s: rank 0 (host n1) is in ")


TEXT = """Thread 0x00007f01 (most recent call first):
  File "/x/threading.py", line 5 in wait

Current thread 0x00007f02 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_gather
  File "/x/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_gather_object
  File "/x/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/p/megatron/checkpoint/together.py", line 66 in _gather
  File "<frozen runpy>", line 88 in _run_code
"""


def test_frames_are_read() -> None:
    assert stacks.waits_in(TEXT) == "all_gather_object"
    assert (
        stacks.main_thread(TEXT).splitlines()[-1] == '  File "/p/megatron/checkpoint/together.py", line 66 in _gather'
    )
    assert "threading" not in stacks.main_thread(TEXT)
    assert stacks.waits_in(TEXT.replace("distributed", "elsewhere")) == ""
    assert (stacks.waits_in(""), stacks.main_thread("")) == ("", "")


SUPERVISED = """
import ctypes, socket
from megatron.launch.supervise import run_ranks
from megatron.whereabouts import Phase, enter
def body(rank):
    whereabouts.begin_step(1)
    whereabouts.begin_step(7)
    enter(Phase.BACKWARD, 3)
    if rank == 1:
        enter(Phase.BATCH)
        (meet / "late").touch()
        {stuck}
    wait_for("late")
    enter(Phase.BACKWARD, 3)
    a_socket, _ = socket.socketpair()
    a_socket.recv(1)
environments = [{{"WORLD_SIZE": "2", "RANK": str(rank)}} for rank in range(2)]
sys.exit(run_ranks(body, environments, Patience(), hang_seconds={seconds}))
"""


@pytest.mark.parametrize(
    ("stuck", "said"),
    [
        ("time.sleep(60)", "in body\n"),
        ("ctypes.PyDLL(None).sleep(60)", "in body\n"),  # holds the interpreter
        ("os.kill(os.getpid(), signal.SIGSTOP)", "and is stopped (by SIGSTOP, Ctrl-Z or a debugger"),
    ],
)  # fmt: skip
def test_a_supervised_run_that_hangs_is_ended_with_a_report(tmp_path: Path, stuck: str, said: str) -> None:
    code, stderr, seconds = finish(SUPERVISED.format(stuck=stuck, seconds=0.6), tmp_path)
    print(stderr)
    assert code == 1
    assert seconds < 15
    assert stderr.count("[warning] No rank has made progress for ") == 1
    last = stderr[stderr.index("The run hangs") :]
    assert "rank 1 (host " in last.splitlines()[1]
    assert "is in batch of step 7" in last.splitlines()[1]
    assert said in last
    assert "Rank 0 on host" in last
    assert 'File "<string>", line ' in last
    assert "supervise.py" not in last
    assert stderr.strip().endswith("set hang_timeout_minutes higher.")


def test_slow_steps_are_no_hang(tmp_path: Path) -> None:
    slow = SUPERVISED.replace("a_socket.recv(1)", "return 0").replace("{stuck}", "")
    steps = "for step in range(8, 13):\n        whereabouts.begin_step(step)\n        time.sleep(0.5)"
    slow = slow.replace("    wait_for", f"    {steps}\n    wait_for")
    code, stderr, seconds = finish(slow.format(seconds=1.5), tmp_path)
    assert (code, stderr) == (0, "")
    assert seconds > 2.5


def test_a_run_that_hangs_while_it_stops_is_ended_too(tmp_path: Path) -> None:
    """Whoever asks a run to stop grants it an hour to save."""
    stuck = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    deaf = "def body(rank):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code, stderr, seconds = finish(
        SUPERVISED.replace("def body(rank):", deaf).format(stuck=stuck, seconds=0.6), tmp_path
    )
    assert code == 1
    assert seconds < 15
    assert "The run hangs: no rank has made progress for" in stderr
