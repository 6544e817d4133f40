"""Checkpoints in a bucket, through a real S3 server: whole or not counted, whatever fails on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import pytest
import torch

from megatron.checkpoint import lock, object_storage, rank_file
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.lock import FolderLock
from megatron.checkpoint.publish import place_of
from megatron.checkpoint.save import take_snapshot
from megatron.checkpoint.steps import clean_leftovers, foreign_folders, whole_steps
from megatron.checkpoint.storage import storage_of
from megatron.checkpoint.writer import write_snapshot
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, same_bits, scattered, small_config, whole
from tests.ranks import run_ranks

MESH = Mesh.single()
BIG = {("w", "weight"): torch.arange(11 << 18, dtype=torch.float32)}  # 11 MiB: three parts of an upload


@pytest.fixture
def root(s3, monkeypatch):
    """An empty folder of a bucket; what fails is tried again without long waits."""
    monkeypatch.setattr(object_storage, "_WAITS", (0.01, 0.02))
    monkeypatch.setattr(object_storage, "_S3_TRIES", 2)
    return storage_of(f"{s3.bucket()}/run", part_size=5 << 20)


def save(root, iteration, state=None, keep_last=None):
    taken = take_snapshot(iteration, whole(state or make_state(iteration)), {}, small_config(), {})
    return write_snapshot(taken, root, MESH, keep_last)


def assert_good(root, least, state=None):
    reader = CheckpointReader(find_checkpoint(root))
    reader.verify()
    iteration = reader.manifest.iteration
    assert iteration >= least
    for (name, kind), tensor in (state or make_state(iteration)).items():
        assert same_bits(reader.read(name, kind), tensor)
    return iteration


def test_a_checkpoint_is_its_objects_and_old_ones_go(root):
    for iteration in (1, 2, 3):
        folder = save(root, iteration, keep_last=2)
    assert folder.files() == ["config.yml", "manifest.json", "rank_00000.safetensors"]
    assert (root.files(), root.folders()) == (["latest"], ["global_step2", "global_step3"])
    assert assert_good(root, 3) == 3


def test_two_ranks_write_to_a_bucket(root):
    state = make_state(4)
    owned = scattered(state, 2, random.Random(4))

    def work():
        mesh = Mesh.create()
        taken = take_snapshot(4, owned[mesh.world.rank], {}, small_config(), {})
        write_snapshot(taken, root, mesh, None)

    run_ranks(2, work)
    assert_good(root, 4)
    assert len([name for name in root.at("global_step4").files() if name.startswith("rank_")]) == 2


def test_an_iteration_is_replaced_in_one_moment(root, monkeypatch):
    save(root, 5, make_state(0))
    with monkeypatch.context() as patch:
        patch.setattr(type(root), "write", _broken)  # the manifest is a write
        patch.setattr("megatron.checkpoint.steps.mark", lambda folder: None)
        with pytest.raises(CheckpointError, match="the store has gone"):
            save(root, 5, make_state(1))
    assert_good(root, 5, make_state(0))
    save(root, 5, make_state(1))
    assert_good(root, 5, make_state(1))
    assert len(root.at("global_step5").files()) == 3  # nothing is left of the other two


def _broken(*_):
    raise OSError(5, "the store has gone")


def test_leftovers_go_and_what_others_put_there_stays(root):
    save(root, 1)
    place = place_of(root, 2)
    place.begin()  # and then the process is killed
    place.folder.write("rank_00000.safetensors", b"half")
    root.write("global_step7/mp_rank_00_model_states.pt", b"another program's")
    assert foreign_folders(root) == ["global_step7"]
    assert list(whole_steps(root)) == [1]
    clean_leftovers(root)
    assert root.folders() == ["global_step1", "global_step7"]


def test_busy_and_broken_connections_are_tried_again(root, s3):
    for fault in (
        {"kind": "busy", "match": r"PUT .*partNumber=2", "times": 3},
        {"kind": "reset", "match": r"PUT .*partNumber=1", "times": 3, "after": 1 << 20},
        {"kind": "busy", "match": r"POST .*uploadId", "times": 1},
        {"kind": "busy", "match": r"PUT .*manifest", "times": 3},
        {"kind": "reset", "match": r"GET .*rank_", "times": 2},
    ):
        faults = s3.faults(**fault)
        save(root, 1, BIG)
        assert faults.times == 0, fault
        assert faults.seen > fault["times"], "it was tried again"
        s3.faults()
        assert_good(root, 1, BIG)


@pytest.mark.parametrize("match", [r"PUT .*partNumber=2", r"PUT .*manifest", r"GET .*rank_"])
def test_what_fails_for_good_fails_the_save_and_nothing_else(root, s3, match):
    save(root, 1)
    s3.faults("reset" if "part" in match else "busy", match=match, times=1000, after=1 << 20)
    with pytest.raises(CheckpointError, match=r"See that the bucket exists and the store answers; earlier"):
        save(root, 2, BIG)
    s3.faults()
    assert_good(root, 1)
    save(root, 3)
    assert assert_good(root, 3) == 3
    assert root.folders() == ["global_step1", "global_step3"]


def test_a_slow_store_takes_its_time(root, s3):
    faults = s3.faults("slow", match="PUT .*partNumber", times=1000, seconds=0.01)
    began = time.monotonic()
    save(root, 1, BIG)
    assert time.monotonic() - began > 0.3
    assert faults.seen == 3
    s3.faults()
    assert_good(root, 1, BIG)


def test_bytes_that_come_back_wrong_are_noticed(root, monkeypatch):
    save(root, 1)
    write = rank_file.write_tensors

    def write_badly(file, name, tensors):
        written = write(file, name, [*tensors[:-1], (tensors[-1][0], tensors[-1][1] + 1)])
        return type(written)(written.name, written.size, written.header_size, written.header_hash, _other(written))

    monkeypatch.setattr(rank_file, "write_tensors", write_badly)
    with pytest.raises(CheckpointError, match="Reading it back gave other values than were written"):
        save(root, 2)
    monkeypatch.undo()
    assert list(whole_steps(root)) == [1]


def _other(written):
    """Return the ranges with the hash that other bytes of the last one would have had."""
    last = written.ranges[-1]
    return (*written.ranges[:-1], type(last)(last.key, last.offset, last.size, "0" * len(last.hashes)))


def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises(CheckpointError, match=r"save = s3://no-such-bucket-here/run: .*See that the bucket exists"):
        FolderLock("s3://no-such-bucket-here/run", MESH)
    with pytest.raises(CheckpointError, match=r"There is no such bucket or folder: s3://no-such-bucket-here\."):
        find_checkpoint("s3://no-such-bucket-here/run")


def test_kill_during_an_upload_never_costs_the_last_good_checkpoint(root):
    torch.set_num_threads(1)
    dice = random.Random(3)
    save(root, 1)
    last = 1
    for saved in (1, 0, 2):  # checkpoints before the kill
        ready, tell = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                root.files()
                os.write(tell, b"1")
                for iteration in range(last + 1, last + 1000):
                    save(root, iteration, keep_last=2)
                    save(root, iteration, keep_last=2)  # which takes the place of the first
                    os.write(tell, b"1")
            finally:
                os._exit(1)
        os.close(tell)
        for _ in range(1 + saved):
            assert os.read(ready, 1) == b"1"
        time.sleep(dice.uniform(0.0, 0.7))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        assert foreign_folders(root) == []
        last = assert_good(root, last + saved)
    save(root, last + 1, keep_last=1)
    assert (root.folders(), root.files()) == ([f"global_step{last + 1}"], ["latest"])


def test_a_bucket_is_locked_by_who_lives(root, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_SETTLE", 0.05)
    monkeypatch.setattr(lock, "_LOST", 1.0)
    first = FolderLock(root, MESH)
    with pytest.raises(CheckpointError, match=r"another run saves there now \(process \d+ on .*\)"):
        FolderLock(root, MESH)
    first.release()
    FolderLock(root, MESH).release()
    assert root.files() == []
    dead = {"owner": "process 1 on gone", "token": "x", "time": time.time(), "beat": 3}
    root.write(".lock", json.dumps(dead).encode())
    began = time.monotonic()
    FolderLock(root, MESH).release()  # killed a moment ago: it gave no sign of life
    assert time.monotonic() - began > 1.0
    root.write(".lock", json.dumps({**dead, "time": 0}).encode())
    FolderLock(root, MESH).release()
    assert threading.active_count() < 30


def test_a_bucket_that_a_process_of_this_machine_left_by_its_end_is_free_at_once(root):
    def hold() -> None:
        FolderLock(root, MESH)
        os._exit(1)

    if (pid := os.fork()) == 0:
        hold()
    os.waitpid(pid, 0)
    assert json.loads(root.read(".lock"))["owner"].startswith(f"process {pid} ")
    began = time.monotonic()
    FolderLock(root, MESH).release()
    assert time.monotonic() - began < 10
