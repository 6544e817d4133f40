"""What may go wrong while saving: kill -9, a full disk, a read-only folder, one rank of several."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from megatron.checkpoint import rank_file, writer
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.local_storage import LocalStorage
from megatron.checkpoint.save import save_checkpoint
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, same_bits, scattered, small_config, whole
from tests.ranks import run_ranks

MESH = Mesh.single()


def save(root, iteration, state=None, keep_last=None):
    return save_checkpoint(
        root, iteration, whole(state or make_state(iteration)), {}, small_config(), {}, MESH, keep_last
    )


def assert_good(root, least):
    reader = CheckpointReader(find_checkpoint(root))
    reader.verify()
    iteration = reader.manifest.iteration
    assert iteration >= least
    for (name, kind), tensor in make_state(iteration).items():
        assert same_bits(reader.read(name, kind), tensor)
    return iteration


def save_until_killed(root, first):
    """Save in a loop in a fork, with what is kept and replaced changing; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        for iteration in range(first, first + 1000):
            save(root, iteration, keep_last=2)
            save(root, iteration, keep_last=2)  # the same iteration again takes the place of the first
    finally:
        os._exit(1)


def test_kill_at_any_moment_never_costs_the_last_good_checkpoint(tmp_path):
    torch.set_num_threads(1)
    dice = random.Random(5)
    last = 1
    save(tmp_path, last)
    for attempt in range(8):
        pid = save_until_killed(tmp_path, last + 1)
        deadline = time.monotonic() + 20
        while not attempt and not (tmp_path / "global_step3").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(dice.uniform(0.005, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        last = assert_good(tmp_path, last)
    assert last > 1
    save(tmp_path, last + 1, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"global_step{last + 1}", "latest"]


def test_too_little_room_is_seen_before_anything_is_written(small_disk):
    save(small_disk, 1)
    big = {("w", "weight"): torch.zeros(3 << 20)}
    message = r"needs 12.6 MB and 16.8 MB besides.*; 2\d\.\d MB are free.*keep_last_n_checkpoints"
    with pytest.raises(CheckpointError, match=message):
        save(small_disk, 2, big)
    assert_good(small_disk, 1)


def test_keeping_fewer_makes_room_for_the_next(small_disk, monkeypatch):
    monkeypatch.setattr(writer, "_SLACK", 1 << 20)
    mid = {("w", "weight"): torch.zeros(5 << 18)}
    for iteration in (1, 2, 3, 4):
        save(small_disk, iteration, mid)
    with pytest.raises(CheckpointError, match=r"delete old checkpoints \(global_step1, global_step2, global_step3\)"):
        save(small_disk, 5, mid)
    save(small_disk, 5, mid, keep_last=1)
    assert sorted(path.name for path in small_disk.iterdir()) == ["global_step5", "latest"]
    CheckpointReader(find_checkpoint(small_disk)).verify()


def test_a_disk_that_becomes_full_while_writing(small_disk, monkeypatch):
    save(small_disk, 1)
    monkeypatch.setattr(writer, "_SLACK", -(1 << 30))  # as if someone else filled the disk after the check
    big = {("w", "weight"): torch.zeros(8 << 20)}
    with pytest.raises(CheckpointError, match=r"The disk became full while it was written.*the last is global_step1"):
        save(small_disk, 2, big)
    assert sorted(path.name for path in small_disk.iterdir()) == ["global_step1", "latest"]
    assert_good(small_disk, 1)
    save(small_disk, 3)
    assert_good(small_disk, 3)


def test_a_folder_that_becomes_read_only(small_disk):
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Read-only file system.*Give this user the right"):
        save(small_disk, 2)
    assert_good(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    save(small_disk, 3)
    assert_good(small_disk, 3)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "The disk became full"),
        (errno.EROFS, "cannot be written .*Give this user the right"),
        (errno.EIO, "Set save to a folder on a disk that works"),
    ],
)
def test_errors_of_the_file_system_are_explained(tmp_path, monkeypatch, number, message):
    save(tmp_path, 1)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rank_file, "write_tensors", fail)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_a_disk_that_returns_other_bytes_is_noticed(tmp_path, monkeypatch):
    save(tmp_path, 1)
    read = LocalStorage.read

    def read_badly(storage, name, offset=0, size=None):
        values = read(storage, name, offset, size)
        if name.startswith("rank_"):
            values[-1] ^= 4
        return values

    monkeypatch.setattr(LocalStorage, "read", read_badly)
    with pytest.raises(CheckpointError, match="Reading it back gave other values"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert_good(tmp_path, 1)


def test_one_failing_rank_fails_the_save_on_all_and_costs_nothing(tmp_path):
    state = make_state(1)
    owned = scattered(state, 2, random.Random(1))

    def work():
        mesh = Mesh.create()
        rank = mesh.world.rank
        save_checkpoint(tmp_path, 1, owned[rank], {}, small_config(), {}, mesh)
        if rank == 1:

            def fail(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            rank_file.write_tensors = fail
        try:
            save_checkpoint(tmp_path, 2, owned[rank], {}, small_config(), {}, mesh)
        except CheckpointError as error:
            return str(error)
        return "saved"

    answers = run_ranks(2, work)
    assert all("The disk became full" in answer for answer in answers)
    assert_good(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_a_file_that_someone_deletes_meanwhile_is_not_promised(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = writer.write_rank_file

    def write_and_lose(folder, name, owned):
        written = write(folder, name, owned)
        folder.delete(name)
        return written

    monkeypatch.setattr(writer, "write_rank_file", write_and_lose)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors has been written, and is gone"):
        save(tmp_path, 2, keep_last=1)
    assert_good(tmp_path, 1)
