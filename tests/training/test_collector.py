"""Garbage is collected between steps at pauses only, and after the run as before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from megatron.training import collector
from megatron.training.collector import WARM_STEPS, Collector


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def garbage() -> weakref.ref[Node]:
    return weakref.ref(Node())


def collections_while(steps: int, inside: Collector) -> int:
    before = sum(generation["collections"] for generation in gc.get_stats())
    for _ in range(steps):
        kept = [[number] for number in range(2000)]  # enough allocations for Python to collect by itself
        inside.after_step(pauses=False)
        del kept
    return sum(generation["collections"] for generation in gc.get_stats()) - before


def test_no_collection_in_the_hot_loop() -> None:
    with Collector() as inside:
        collections_while(WARM_STEPS, inside)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        waste = garbage()
        assert collections_while(20, inside) == 0
        assert waste() is not None
        inside.after_step(pauses=True)
        assert waste() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_without_pauses_collects_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "MOST_STEPS", 10)
    with Collector() as inside:
        assert collections_while(WARM_STEPS, inside) > 0
        waste = garbage()
        collections_while(10, inside)
        assert waste() is None


def test_an_error_and_a_short_run_leave_python_as_it_was() -> None:
    def fail() -> None:
        with Collector() as inside:
            collections_while(WARM_STEPS, inside)
            raise ValueError("in a step")

    with pytest.raises(ValueError, match="in a step"):
        fail()
    assert gc.isenabled()
    gc.disable()
    with Collector() as inside:
        inside.after_step(pauses=False)
    assert not gc.isenabled()
