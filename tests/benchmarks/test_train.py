"""The training benchmark: its sides compute one function, and what it judges is what it measured."""

from dataclasses import replace

import pytest
import torch

from benchmarks import train
from benchmarks.train import OURS, Row, misses
from benchmarks.train_sides import SIDES
from benchmarks.train_sizes import Size
from benchmarks.train_turns import Turn, forked, take_turn

TINY = Size("tiny", 2, 32, 4, 2, 16, aim=100.0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("side", "precision"), [("hf", "fp32"), ("plain", "fp32"), ("plain", "bf16")])
def test_sides_train_the_same_model(side, precision):
    ours, theirs = (SIDES[name](replace(TINY, heads=2), precision, CPU) for name in (OURS, side))
    for _ in range(3):
        assert float(theirs()) == pytest.approx(float(ours()), rel={"fp32": 1e-6, "bf16": 1e-3}[precision])


def test_a_turn_measures_steps_of_a_process_of_its_own():
    turn = take_turn(SIDES["plain"], TINY, "fp32", (1, 3, True))
    assert not turn.error
    assert len(turn.seconds) == len(turn.processor) == 3
    assert all(second > 0 for second in turn.seconds)
    assert turn.launches > 100
    assert turn.losses[0] == pytest.approx(10.8, abs=0.1)
    assert len(turn.losses) == 4


def test_a_side_that_fails_says_why():
    def broken(size, precision, device):
        raise ImportError("no such library\nsecond line")

    assert take_turn(broken, TINY, "fp32", (1, 1, False)).error == "ImportError: no such library"
    assert "ended with 3" in forked(lambda: __import__("os")._exit(3))


def row(side, ratio=1.0, memory=1.0, rate=200.0, precision="fp32"):
    return Row("tiny", precision, side, rate, 0.1, 0.1, memory, 0, 0, ratio, ratio, (1.0,))


def test_each_missed_aim_is_a_line():
    assert misses([row(OURS), row("hf", 1.5), row("plain", 1.4), row("plain pure", 1.1, 0.5)], [TINY], "CPU") == []
    theirs = [row("deepspeed", 1.2), row("deepspeed 2", 1.1), row("deepspeed 3", 1.15)]
    slow = misses([row(OURS, memory=2.0), row("hf", 1.5), row("plain", 1.2), *theirs], [TINY], "CPU")
    assert slow == [
        "tiny fp32: ours is 1.20 times as fast as plain, the aim is 1.3",
        "tiny fp32: ours takes 2.00 GiB, hf 1.00",
        "tiny fp32: DeepSpeed's engine takes 1.20 times as long (deepspeed), the aim is 1.1",
        "tiny fp32: DeepSpeed's engine takes 1.15 times as long (deepspeed 3), the aim is 1.1",
    ]
    assert misses([row(OURS, rate=99.0)], [TINY], "NVIDIA H200") == ["tiny fp32: 99 tokens/s, the aim is 100"]


def test_a_side_that_fails_or_differs_costs_only_its_own_row(monkeypatch):
    found = {
        OURS: Turn(error="ValueError: no"),
        "hf": Turn((10.0, 9.0, 8.0), (2.0, 2.0), (1.0, 1.0)),
        "plain": Turn((10.0, 9.0, 9.0), (1.0, 1.0), (1.0, 1.0)),
        "ours compiled": Turn((10.0, 9.0, 8.001), (1.0, 1.0), (1.0, 1.0)),
    }
    monkeypatch.setattr(train, "SIDES", {side: side for side in found})
    monkeypatch.setattr(train, "take_turn", lambda side, *_: found[side])
    known = {}
    rows = train._measured(TINY, "bf16", [OURS, "hf", "plain"], True, 1e12, known)
    assert [(row.side, row.ratio) for row in rows] == [("hf", 1.0), ("plain", 0.5)]
    assert [row.differs for row in rows] == [
        "",
        "it computes another function: after two updates its loss is 9.0, ours 8.0",
    ]
    (late,) = train._measured(TINY, "bf16", ["ours compiled"], True, 1e12, known)
    assert (late.ratio, late.differs) == (0.5, "")
    assert misses(rows, [TINY], "NVIDIA H200") == ["tiny bf16: ours did not run"]


def test_what_compiles_comes_last_on_a_gpu(monkeypatch):
    monkeypatch.setattr(train, "ON_GPU", True)
    monkeypatch.setattr("sys.argv", ["train.py", "--quick"])
    first, second = train._passes(train._options())
    assert first == [OURS, "ours fused", "hf"]
    assert second == ["ours compiled", "ours recorded"]
