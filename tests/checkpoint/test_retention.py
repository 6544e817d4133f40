"""When to save and what to keep."""

from __future__ import annotations

import pytest

from megatron.checkpoint import retention, writer
from megatron.checkpoint.retention import prune, save_iterations
from megatron.checkpoint.save import save_checkpoint, take_snapshot
from megatron.checkpoint.steps import whole_steps
from megatron.checkpoint.storage import storage_of
from megatron.checkpoint.writer import write_snapshot
from megatron.config.schema.run import CheckpointConfig
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, small_config, whole


def test_linear_saves_every_k_steps_and_the_last():
    config = CheckpointConfig(save="x", checkpoint_factor=30.0)
    assert save_iterations(config, 100) == [30, 60, 90, 100]
    assert save_iterations(config, 60) == [30, 60]


def test_log_saves_at_powers_of_k():
    config = CheckpointConfig(save="x", checkpoint_factor=2.0, checkpoint_scale="log")
    assert save_iterations(config, 100) == [1, 2, 4, 8, 16, 32, 64, 100]
    fractional = CheckpointConfig(save="x", checkpoint_factor=1.5, checkpoint_scale="log")
    assert save_iterations(fractional, 12) == [1, 2, 3, 5, 8, 11, 12]


def test_extra_iterations_and_the_initial_model():
    config = CheckpointConfig(save="x", extra_save_iters=[0, 7, 500])
    assert save_iterations(config, 100) == [0, 7, 100]


def test_nothing_is_saved_without_a_folder():
    assert save_iterations(CheckpointConfig(checkpoint_factor=10.0), 100) == []


def save(root, iteration, keep):
    config = small_config(keep_last_n_checkpoints=keep)
    save_checkpoint(root, iteration, whole(make_state()), {}, config, {}, Mesh.single())


def test_the_last_n_stay(tmp_path):
    for iteration in (2, 10, 9, 11):
        save(tmp_path, iteration, 2)
    assert list(whole_steps(storage_of(tmp_path))) == [10, 11]


def test_checkpoints_of_later_iterations_are_left_alone(tmp_path, caplog):
    save(tmp_path, 1000, 1)
    save(tmp_path, 10, 1)
    assert list(whole_steps(storage_of(tmp_path))) == [10, 1000]
    assert (tmp_path / "latest").read_text() == "global_step10"


def test_what_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    for iteration in (1, 2):
        save(tmp_path, iteration, 5)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megatron.checkpoint.local_storage.shutil.rmtree", fail)
    prune(storage_of(tmp_path), 2, 1)
    assert list(whole_steps(storage_of(tmp_path))) == [2]
    save(tmp_path, 3, 5)  # what is left of it stands in no later save's way
    assert list(whole_steps(storage_of(tmp_path))) == [2, 3]


def test_what_cannot_be_listed_after_a_save_is_a_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "The store does not answer")

    monkeypatch.setattr(retention, "whole_steps", fail)
    save(tmp_path, 1, None)
    assert (tmp_path / "latest").read_text() == "global_step1"


@pytest.mark.parametrize("good", [None, 4])
def test_what_the_run_needs_stays_until_the_next_is_safe(tmp_path, monkeypatch, good):
    """The run was taken back to 4; 5 is of the branch that it left, or damaged."""
    for iteration in (5, 4):
        save(tmp_path, iteration, None)
    if good is not None:
        (tmp_path / "latest").write_text("global_step5")
    taken = take_snapshot(6, whole(make_state()), {}, small_config(), {})
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_rank_file", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(CheckpointError, match="broken"):
            write_snapshot(taken, storage_of(tmp_path), Mesh.single(), 1, good)
    assert list(whole_steps(storage_of(tmp_path))) == [4, 5]
    write_snapshot(taken, storage_of(tmp_path), Mesh.single(), 1, good)
    assert list(whole_steps(storage_of(tmp_path))) == [6]
