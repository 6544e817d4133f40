from __future__ import annotations

import pytest

from megatron.errors import ConfigError, LaunchError, Problem
from megatron.launch.failure import Failure, explain_signal, first_cause, from_exception, from_exit, from_loss
from megatron.whereabouts import Phase, Position


def failure(**changes: object) -> Failure:
    values = {"rank": 1, "world_size": 2, "host": "n1", "step": 5, "exit_code": 1, "text": "text", **changes}
    return Failure(**values)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    original = failure(is_echo=True, when=1.5, step=None)
    assert Failure.from_json(original.to_json()) == original


def test_words_for_a_bug() -> None:
    assert str(failure()) == (
        "text\n\nrank 1 of 2 on host n1 failed at step 5, exit code 1. The other ranks were stopped."
    )
    alone = str(failure(rank=0, world_size=1, step=None))
    assert alone == "text\n\nrank 0 on host n1 failed before its first step, exit code 1."


def test_a_mistake_stands_by_itself() -> None:
    error = ConfigError(Problem("x = 1", "is bad.", "Write 2.", "a.yml:3"))
    found = from_exception(error, 1, 2, "n1")
    assert str(found) == "a.yml:3: x = 1: is bad. Write 2."
    assert found.exit_code == 2
    assert from_exception(LaunchError(Problem("a", "b", "c")), 0, 1, "n1").exit_code == 1


def test_the_traceback_names_the_place_and_the_notes() -> None:
    try:
        raise ValueError("bad loss")
    except ValueError as error:
        error.add_note("micro-batch 3")
        found = from_exception(error, 0, 1, "n1")
    assert "test_failure.py" in found.text
    assert found.text.endswith("ValueError: bad loss\nmicro-batch 3\n")


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242",
        "NCCL error: remote process exited or there was a network error",
        "Timed out waiting 1800000ms for recv operation to complete",
        "failed to recv, got 0 bytes",
    ],
)
def test_the_end_of_a_peer_is_an_echo(text: str) -> None:
    assert from_exception(RuntimeError(text), 0, 2, "n1").is_echo


def test_an_echo_alone_names_the_loss_and_not_its_own_traceback() -> None:
    text = "Traceback ...\n  File torch/distributed/x.py\nError: [gloo/pair.cc] Connection reset by peer. GLHF!\n"
    said = str(failure(rank=0, text=text, is_echo=True))
    assert said.startswith("rank 0 of 2 on host n1 lost another rank at step 5, which ended without a word (killed?).")
    assert said.endswith("What rank 0 saw: Error: [gloo/pair.cc] Connection reset by peer")
    web = "Traceback ...\nurllib.error.URLError: Connection refused"
    assert str(failure(text=web, is_echo=True)).startswith(web)


def test_first_cause() -> None:
    echo, early, late = failure(is_echo=True, when=1.0), failure(when=2.0), failure(text="later", when=3.0)
    assert first_cause([late, echo, early]) is early
    others = [failure(text="another", when=1.5, rank=3), failure(text="another", when=1.7, rank=0)]
    assert first_cause([late, echo, *others]).rank == 0
    assert first_cause([echo]) is echo


def test_a_rank_of_which_nothing_is_left_was_lost_where_it_was_heard_of_last() -> None:
    lost = from_loss(1, 2, "n2", Position(Phase.BACKWARD, 4, 3))
    assert str(lost).startswith("rank 1 of 2 on host n2 was lost at step 4, micro-batch 3, in backward: that machine")
    assert from_loss(1, 2, "n2", Position(Phase.ENGINE), reached=4).at == "at step 4"
    assert lost.brief.startswith("rank 1 on host n2 was lost at step 4, micro-batch 3, in backward (that machine")


def test_signals_have_reasons() -> None:
    assert "It had used up to 3.0 GiB of this machine's" in explain_signal(9, 3 * 2**30)
    for words in ("SIGBUS (-7)", "shared memory is full", "--shm-size=8g", "/dev/shm has"):
        assert words in explain_signal(7, 0)
    assert "SIGSEGV (-11), a crash inside native code" in explain_signal(11, 0)
    assert explain_signal(64, 0).startswith("The process was ended by SIGRTMAX (-64)")
    assert from_exit(-9, 0, 0, 1, "n1").exit_code == 137
    assert from_exit(3, 0, 0, 1, "n1").exit_code == 3
