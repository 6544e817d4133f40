"""What a run does around its saves: one at a time, in the foreground or behind it, here and in a bucket."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from typing import Any

import pytest
import torch

from megatron.checkpoint import object_storage, writer
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.local_storage import LocalStorage
from megatron.checkpoint.save import take_snapshot
from megatron.checkpoint.steps import whole_steps
from megatron.checkpoint.storage import storage_of
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from megatron.training import saver as saver_module
from megatron.training.saver import Saver
from tests.checkpoint.states import make_state, same_bits, small_config, whole


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the saver says."""
    lines: list[str] = []
    for level in ("info", "error"):
        monkeypatch.setattr(saver_module.logger, level, lambda text, *values: lines.append(text % values))
    return lines


def make_saver(root: Any, **keys: Any) -> Saver:
    return Saver(small_config(save=str(root), checkpoint_factor=1, **keys), Mesh.single())


def save(saver: Saver, iteration: int, last: bool = False) -> None:
    saver.save(iteration, lambda: take_snapshot(iteration, whole(make_state(iteration)), {}, small_config(), {}), last)


def assert_good(root: Any, least: int) -> int:
    reader = CheckpointReader(find_checkpoint(root))
    reader.verify()
    iteration = reader.manifest.iteration
    assert iteration >= least
    for (name, kind), tensor in make_state(iteration).items():
        assert same_bits(reader.read(name, kind), tensor)
    return iteration


def test_in_the_background_it_says_how_long_it_blocked(tmp_path, said):
    saver = make_saver(tmp_path, async_save=True)
    save(saver, 1)
    deadline = time.monotonic() + 20
    while not (found := saver.written()) and time.monotonic() < deadline:
        time.sleep(0.01)
    saver.close()
    assert [(iteration, str(folder)) for iteration, folder, _ in found] == [(1, str(tmp_path / "global_step1"))]
    assert re.fullmatch(r"saved .*global_step1 in the background: blocked \d+\.\d\d s, written in \d+\.\d s", said[0])
    assert_good(tmp_path, 1)


def test_a_following_save_waits_and_says_so(tmp_path, said, monkeypatch):
    sync = LocalStorage.sync
    monkeypatch.setattr(LocalStorage, "sync", lambda storage: (time.sleep(0.1), sync(storage))[1])
    saver = make_saver(tmp_path, async_save=True, keep_last_n_checkpoints=2)
    for iteration in (1, 2, 3):
        save(saver, iteration)
    save(saver, 3, last=True)  # which waits for the one in the background and finds nothing left to do
    assert [iteration for iteration, _, _ in saver.written()] == [1, 2, 3]
    saver.close()
    assert sum(bool(re.match(r"waited \d+\.\d s for the save of iteration", line)) for line in said) == 3
    assert list(whole_steps(storage_of(tmp_path))) == [2, 3]
    assert_good(tmp_path, 3)


def test_a_failure_behind_is_told_at_the_next_step_and_the_last_save_tries_again(tmp_path, said, monkeypatch):
    saver = make_saver(tmp_path, async_save=True)
    save(saver, 1)
    save(saver, 1)  # waits, and does nothing more
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write_stream", _no_space)
        save(saver, 2)
        deadline = time.monotonic() + 20
        while not any("failed" in line for line in said) and time.monotonic() < deadline:
            saver.written()
            time.sleep(0.01)
        assert "saving iteration 2 failed in the background." in said[-1]
        assert "The earlier ones are intact, the last is global_step1" in said[-1]
        assert_good(tmp_path, 1)
        assert saver.newest() == 1  # where a rollback goes
        with pytest.raises(CheckpointError, match="The disk became full"):
            save(saver, 2, last=True)
    save(saver, 2, last=True)
    assert saver.newest() == 2
    saver.goes_on_from(1)  # since the second turned out to be damaged
    save(saver, 2)
    saver.close()
    assert [iteration for iteration, _, _ in saver.written()] == [2, 2]
    assert assert_good(tmp_path, 2) == 2


def test_a_disk_that_becomes_full_behind_costs_one_checkpoint(small_disk, said, monkeypatch):
    saver = make_saver(small_disk, async_save=True)
    save(saver, 1)
    save(saver, 1)
    monkeypatch.setattr(writer, "_SLACK", -(1 << 30))  # as if someone else filled the disk after the check
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((24 << 20) - (64 << 10)))
    big = {("w", "weight"): torch.zeros(1 << 20)}
    saver.save(2, lambda: take_snapshot(2, whole(big), {}, small_config(), {}), last=False)
    saver._settle()
    ballast.unlink()
    assert any("saving iteration 2 failed in the background." in line and "became full" in line for line in said)
    assert_good(small_disk, 1)
    save(saver, 3, last=True)
    saver.close()
    assert assert_good(small_disk, 3) == 3
    assert sorted(path.name for path in small_disk.iterdir()) == [".lock", "global_step1", "global_step3", "latest"]


def _no_space(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_closing_waits_for_what_is_being_written(tmp_path, monkeypatch):
    sync = LocalStorage.sync
    monkeypatch.setattr(LocalStorage, "sync", lambda storage: (time.sleep(0.1), sync(storage))[1])
    saver = make_saver(tmp_path, async_save=True)
    save(saver, 4)
    saver.close()
    assert assert_good(tmp_path, 4) == 4
    make_saver(tmp_path).close()  # the folder is free again


def test_every_checkpoint_goes_to_the_bucket_too(tmp_path, s3, said):
    bucket = s3.bucket()
    saver = make_saver(tmp_path, s3_path=f"{bucket}/copy", keep_last_n_checkpoints=1, async_save=True)
    for iteration in (1, 2):
        save(saver, iteration, last=iteration == 2)
    saver.close()
    copy = storage_of(f"{bucket}/copy")
    assert list(whole_steps(storage_of(tmp_path))) == [2]
    assert list(whole_steps(copy)) == [1, 2]
    assert copy.read("latest") == b"global_step2"
    assert sum(line.startswith(f"copied it to {bucket}/copy/global_step") for line in said) == 2
    for name in ("manifest.json", "config.yml", "rank_00000.safetensors"):
        assert copy.at("global_step2").read(name) == (tmp_path / "global_step2" / name).read_bytes()
    assert copy.files() == ["latest"]


def test_a_bucket_that_fails_costs_the_copy_and_not_the_checkpoint(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(object_storage, "_WAITS", (0.01,))
    monkeypatch.setattr(object_storage, "_S3_TRIES", 2)
    bucket = s3.bucket()
    saver = make_saver(tmp_path, s3_path=f"{bucket}/copy")
    save(saver, 1)
    s3.faults("busy", match="PUT .*rank_", times=1000)
    with pytest.raises(CheckpointError, match=r"s3_path = .*global_step2 is saved, but could not be copied there"):
        save(saver, 2)
    assert_good(tmp_path, 2)
    s3.faults()
    assert list(whole_steps(storage_of(f"{bucket}/copy"))) == [1]
    assert saver.newest() == 2  # to which a run may go back
    save(saver, 2, last=True)
    saver.close()
    assert list(whole_steps(storage_of(f"{bucket}/copy"))) == [1, 2]


def save_until_killed(root: Any, first: int) -> int:
    """Save in the background in a fork, again and again; return its process id once it has begun."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        return pid
    try:
        torch.set_num_threads(1)
        saver = make_saver(root, async_save=True, keep_last_n_checkpoints=2)
        for iteration in range(first, first + 1000):
            save(saver, iteration)
            os.write(tell, b"1" if iteration == first else b"")
            time.sleep(0.002)
    finally:
        os._exit(1)


def test_kill_in_the_background_never_costs_the_last_good_checkpoint(tmp_path):
    torch.set_num_threads(1)
    dice = random.Random(8)
    saver = make_saver(tmp_path)
    save(saver, 1, last=True)
    saver.close()
    last = 1
    for _ in range(10):
        pid = save_until_killed(tmp_path, last + 1)
        time.sleep(dice.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        last = assert_good(tmp_path, last)
    assert last > 1
    saver = make_saver(tmp_path, keep_last_n_checkpoints=1)
    save(saver, last + 1, last=True)
    saver.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", f"global_step{last + 1}", "latest"]


def test_no_thread_is_left(tmp_path):
    before = set(threading.enumerate())
    saver = make_saver(tmp_path, async_save=True)
    save(saver, 1)
    saver.close()
    assert not set(threading.enumerate()) - before
