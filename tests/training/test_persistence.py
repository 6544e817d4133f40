"""Where a run begins, and that it never writes over what another run saved."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.checkpoint.compatible import changed_settings
from megatron.checkpoint.layout import LOCK, MANIFEST, step_name
from megatron.checkpoint.load import CheckpointReader
from megatron.checkpoint.local_storage import LocalStorage
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.steps import foreign_folders
from megatron.checkpoint.storage import storage_of
from megatron.config.resolve import resolve
from megatron.config.schema.run import CheckpointConfig
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from megatron.training import source as source_module
from megatron.training.source import Source, find_source
from tests.end_to_end.tiny import settings


def checkpoints(folder: Path, *iterations: int) -> str:
    """Make folders that look like checkpoints of `iterations`; return their root."""
    for iteration in iterations:
        (folder / step_name(iteration)).mkdir(parents=True)
        (folder / step_name(iteration) / MANIFEST).write_text("{}")
    return str(folder)


def source(**keys: Any) -> Source | None:
    return find_source(CheckpointConfig(**keys))


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    assert source() is None
    assert source(save=str(tmp_path / "none")) is None
    assert source(save=str(tmp_path / "none"), resume="auto") is None


def test_resume_goes_on_from_its_own_newest_whatever_load_and_finetune_say(tmp_path: Path) -> None:
    base, own = checkpoints(tmp_path / "base", 9), checkpoints(tmp_path / "own", 2, 4)
    found = source(save=own, load=base, finetune=True, resume="auto")
    assert found == Source(storage_of(own).at("global_step4"), is_own=True)


def test_load_from_elsewhere_into_an_empty_folder(tmp_path: Path) -> None:
    base = checkpoints(tmp_path / "base", 9)
    found = source(save=str(tmp_path / "own"), load=base, resume="auto")
    assert found == Source(storage_of(base).at("global_step9"), is_own=False)


def test_load_of_the_same_folder_is_a_resume_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = checkpoints(tmp_path / "own", 2, 4)
    monkeypatch.chdir(tmp_path)
    for load in (own, "own/", "own/global_step2", "../" + tmp_path.name + "/own"):
        found = source(save="own", load=load)
        assert found is not None
        assert found.is_own


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"up to iteration 4, and this run would write over them.*resume: auto .*load: .*own to continue"),
        ({"load": "base"}, r"up to iteration 4, and this run would write over them\. Set resume: auto to continue"),
        ({"load": "base", "finetune": True}, r"this run would write over them\. Set resume: auto"),
        ({"load": "own", "finetune": True}, r"finetune begins at step 0\. Set save to another folder"),
    ],
)
def test_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(Path("base"), 9)
    checkpoints(Path("own"), 2, 4)
    with pytest.raises(CheckpointError, match=message):
        source(save="own", **keys)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_folders_of_another_program_are_not_replaced(tmp_path: Path, resume: str) -> None:
    (tmp_path / "global_step1000").mkdir()
    (tmp_path / "global_step1000" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"it holds global_step1000 without a manifest.*which saves would replace"
    ):
        source(save=str(tmp_path), resume=resume)


def test_a_checkpoint_of_ours_without_its_manifest_is_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    """No save leaves such a one: a deletion that was broken off does, and a copy that is under way."""
    said: list[str] = []
    monkeypatch.setattr(source_module.logger, "warning", lambda text, *values: said.append(text % values))
    checkpoints(tmp_path, 2, 4)
    (tmp_path / "latest").write_text("global_step4")
    (tmp_path / "global_step4" / "manifest.json").unlink()
    assert foreign_folders(storage_of(tmp_path)) == []
    found = source(save=str(tmp_path), resume="auto")
    assert found is not None
    assert found.folder.name == "global_step2"
    assert said[0].startswith("INCOMPLETE CHECKPOINTS in")
    assert "latest names iteration 4, which is not there. resume: auto takes iteration 2" in said[1]
    (tmp_path / "global_step2" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"global_step2, global_step4 there is no manifest\.json.*no other"):
        source(save=str(tmp_path), resume="auto")


def test_which_checkpoint_is_the_newest(tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(source_module.logger, "warning", lambda text, *values: said.append(text % values))
    checkpoints(tmp_path, 2, 6, 8)
    for latest, newest in (("global_step6", 6), ("global_step5", 2), ("global_step1", 8), ("", 8)):
        (tmp_path / "latest").write_text(latest)
        found = source(save=str(tmp_path), resume="auto")
        assert found is not None
        assert found.folder.name == f"global_step{newest}"
    assert "also holds iteration 8, after the one that its file `latest` names" in said[0]
    found = source(save=str(tmp_path), resume="auto", iteration=6)
    assert found is not None
    assert "iteration: 6 takes the run back, though" in said[-1]

    def fail(*_: object) -> bytearray:
        raise OSError(5, "the store does not answer")

    monkeypatch.setattr(LocalStorage, "read", fail)
    with pytest.raises(OSError, match="does not answer"):
        source(save=str(tmp_path), resume="auto")  # and not another one than `latest` names


def test_an_iteration_that_no_folder_has_is_no_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iteration = 4: .* holds no checkpoint, and load names none"):
        source(save=str(tmp_path), resume="auto", iteration=4)


def test_copies_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    checkpoints(copies, 2)
    keys = {"save": str(tmp_path / "own"), "resume": "auto", "s3_path": str(copies)}
    with pytest.raises(CheckpointError, match=r"s3_path = .*up to iteration 2, .*load: .*copies to continue"):
        source(**keys)
    assert source(**keys, load=str(copies)) is not None
    checkpoints(tmp_path / "own", 2)
    assert source(**keys) is not None


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / "new" / "own", Mesh.single())
    with pytest.raises(CheckpointError, match=r"another run saves there now \(process \d+ on .*set save to another"):
        FolderLock(tmp_path / "new" / "own", Mesh.single())
    first.release()
    FolderLock(tmp_path / "new" / "own", Mesh.single()).release()


def test_a_folder_that_cannot_be_written_is_told_at_the_start() -> None:
    with pytest.raises(CheckpointError, match=r"save = /proc/none: The folder cannot be written.*set another save"):
        FolderLock(Path("/proc/none"), Mesh.single())


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    FolderLock(tmp_path, Mesh.single()).release()
    assert (tmp_path / LOCK).is_file()


def test_what_changed_since_a_checkpoint_is_told(tmp_path: Path) -> None:
    faster = {"type": "Adam", "params": {"lr": 0.02, "betas": [0.9, 0.95]}}
    then = resolve(settings(tmp_path))
    now = resolve(settings(tmp_path, train_iters=16, seed=5, optimizer=faster, num_workers=0, rope_fusion=False))
    manifest = SimpleNamespace(config=then.model_dump(mode="json"))
    reader = cast(CheckpointReader, SimpleNamespace(manifest=manifest))
    assert changed_settings(reader, then) == []
    assert sorted(changed_settings(reader, now)) == [
        "lr: 0.01 -> 0.02", "rope_fusion: auto -> False", "seed: 1234 -> 5", "train_iters: 8 -> 16",
    ]  # fmt: skip


def test_a_first_run_that_loads_what_it_saves_is_told_of_resume(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with pytest.raises(CheckpointError, match="Write resume: auto instead of load"):
        source(save=str(tmp_path), load=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds: nothing"):
        source(save=str(tmp_path / "other"), load=str(tmp_path))
