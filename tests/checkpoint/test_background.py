"""Saving while training goes on: the state is that of its step, bit by bit, and nothing gets lost or mixed up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import background, host_copy
from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.host_copy import HostCopies
from megatron.checkpoint.layout import rank_file, step_name
from megatron.checkpoint.save import save_checkpoint, take_snapshot
from megatron.checkpoint.storage import storage_of
from megatron.checkpoint.writer import write_snapshot
from megatron.engine.build import build_engine
from megatron.errors import CheckpointError, Problem
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import all_dtypes, make_state, same_bits, small_config, whole
from tests.parallel.matrix import VOCAB, make_batches, make_config, make_mesh, micro_batches
from tests.ranks import run_ranks

PLENTY = 1 << 40


def snapshot(iteration: int = 1, state=None):
    return take_snapshot(iteration, whole(state or make_state(iteration)), {}, small_config(), {})


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "our engine": ({}, 1),
    "our engine, data parallel": ({}, 2),
    "ZeRO 1": ({"stage": 1}, 2),
    "ZeRO 2": ({"stage": 2, "precision": "bf16"}, 2),
    "ZeRO 3": ({"stage": 3}, 2),
    "tensor parallel": ({"model_parallel_size": 2, "precision": "bf16"}, 2),
    "pipeline": ({"pipe_parallel_size": 2, "stage": 1}, 2),
}


def save_while_training(root: Path, flat: dict[str, Any], world_size: int) -> None:
    """Save after step 2 in the foreground and in the background, where writing begins only two steps later."""
    config = make_config(flat, world_size)
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    batches = make_batches(config)
    for step in range(2):
        engine.train_step(micro_batches(config, batches[step], mesh), step)
    save_checkpoint(root / "waiting", 2, engine.state_pieces(), {}, config, None, mesh)
    saver, go_on = BackgroundSaver(mesh, lambda: PLENTY), threading.Event()

    def write_later(taken: Any, own: Mesh) -> Any:
        assert go_on.wait(30)
        return write_snapshot(taken, storage_of(root / "going on"), own, None)

    assert saver.start(take_snapshot(2, engine.state_pieces(), {}, config, None), write_later)
    for step in (2, 3):
        engine.train_step(micro_batches(config, batches[step], mesh), step)
    assert saver.finished() is None
    go_on.set()
    engine.train_step(micro_batches(config, batches[4], mesh), 4)  # while the ranks agree on what they write
    finished = saver.wait()
    assert finished is not None
    assert finished.error is None
    save_checkpoint(root / "later", 2, engine.state_pieces(), {}, config, None, mesh)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_the_state_of_its_step(tmp_path: Path, layout: str) -> None:
    flat, size = LAYOUTS[layout]
    run_ranks(size, save_while_training, tmp_path, flat, size)
    for rank in range(size):
        files = [tmp_path / name / step_name(2) / rank_file(rank) for name in ("waiting", "going on", "later")]
        if not files[0].exists():
            continue  # a rank that owns nothing
        waiting, going_on, later = (file.read_bytes() for file in files)
        assert going_on == waiting
        assert later != waiting


def test_copies_are_exact_and_their_memory_is_used_again(monkeypatch):
    monkeypatch.setattr(host_copy, "_CHUNK", 256)  # so that there are many chunks
    copies = HostCopies(torch.device("cpu"))
    state = all_dtypes(3)
    pieces = whole(state)
    assert copies.missing(pieces) > sum(t.numel() * t.element_size() for t in state.values())
    first = copies.copy(pieces)
    assert copies.missing(pieces) == 0
    expected = [piece.data.clone() for piece in pieces]
    for piece in pieces:
        piece.data.view(torch.uint8).zero_()
    assert all(same_bits(copy.data, tensor) for copy, tensor in zip(first, expected, strict=True))
    second = copies.copy(pieces)
    assert [copy.data.data_ptr() for copy in second] == [copy.data.data_ptr() for copy in first]
    assert not any(copy.data.view(torch.uint8).any() for copy in second)


def test_too_little_host_memory_is_said_before_anything_is_copied(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(background.logger, "warning", lambda text, *values: said.append(text % values))
    saver = BackgroundSaver(Mesh.single(), lambda: 100)
    assert not saver.start(snapshot(), lambda *_: pytest.fail("it must not be written here"))
    assert not saver.is_busy
    assert saver._copies.missing(snapshot().pieces) > 0
    assert not saver.start(snapshot(2), lambda *_: pytest.fail("it must not be written here"))
    assert len(said) == 1
    assert "is written while training waits. The copies need 2048 bytes of host memory on " in said[0]
    assert said[0].endswith("where 100 bytes are available.")


def test_memory_that_the_system_refuses_is_no_end(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    saver = BackgroundSaver(Mesh.single(), lambda: PLENTY)
    taken = snapshot()
    monkeypatch.setattr(host_copy.torch, "empty", refuse)
    assert not saver.start(taken, lambda *_: pytest.fail("it must not be written here"))


def test_an_error_is_an_outcome_and_a_bug_is_raised():
    saver = BackgroundSaver(Mesh.single(), lambda: PLENTY)

    def fail(*_):
        raise CheckpointError(Problem("disk", "full.", "Buy one."))

    def break_down(*_):
        raise ZeroDivisionError

    assert saver.wait() is None
    saver.start(snapshot(7), fail)
    finished = saver.wait()
    assert finished is not None
    assert (finished.iteration, finished.folder) == (7, None)
    assert "full" in str(finished.error)
    saver.start(snapshot(8), break_down)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    assert saver.finished() is None
