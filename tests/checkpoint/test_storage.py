"""A folder and an object store, asked the same questions."""

from __future__ import annotations

import os
import stat
import uuid

import pytest

from megatron.checkpoint import object_storage
from megatron.checkpoint.local_storage import LocalStorage
from megatron.checkpoint.storage import is_url, storage_of
from megatron.errors import CheckpointError


@pytest.fixture(params=["folder", "memory", "s3"])
def root(request, tmp_path):
    """An empty storage of each kind."""
    if request.param == "folder":
        storage = storage_of(tmp_path / "run")
    elif request.param == "memory":
        storage = storage_of(f"memory://{uuid.uuid4().hex}/run")
    else:
        storage = storage_of(f"{request.getfixturevalue('s3').bucket()}/run", part_size=5 << 20)
    storage.make()
    return storage


def test_files_and_folders(root):
    assert (root.folders(), root.files(), root.size("latest")) == ([], [], None)
    root.write("latest", b"one")
    root.write("latest", b"three")
    root.at("b").make()
    root.at("b").write("x", b"1")
    root.write("a/y/z", b"2")
    assert root.files() == ["latest"]
    assert root.folders() == ["a", "b"]
    assert root.at("a").folders() == ["y"]
    assert root.size("latest") == 5
    assert root.size("a") is None
    assert root.exists("a")
    assert root.exists("a/y/z")
    assert not root.exists("latest2")
    root.delete("a")
    root.delete("nothing")
    root.delete("b/x")
    root.at("b").delete()
    assert (root.folders(), root.files()) == ([], ["latest"])


def test_ranges(root):
    content = bytes(range(256)) * 10
    root.write("x", content)
    assert root.read("x") == content
    assert root.read("x", 300) == content[300:]
    assert root.read("x", 300, 500) == content[300:800]
    assert root.read("x", 2500, 500) == content[2500:]
    assert root.read("x", 4000, 5) == b""
    assert root.read("x", 7, 0) == b""
    with pytest.raises(FileNotFoundError):
        root.read("y", 0, 5)


def test_a_stream_appears_whole_or_not_at_all(root):
    block = bytes(range(256)) * 4096  # 1 MiB; 12 of them are three parts

    def fill(file):
        return sum(file.write(block) for _ in range(12))

    def fail(file):
        fill(file)
        raise RuntimeError("the second tensor")

    folder = root.at("step")
    folder.make()
    assert folder.write_stream("good", fill) == 12 << 20
    with pytest.raises(RuntimeError, match="the second tensor"):
        folder.write_stream("bad", fail)
    assert folder.files() == ["good"]
    assert folder.read("good", 5 << 20, 1 << 20) == block


def test_names(tmp_path):
    for root in (storage_of(tmp_path / "run"), storage_of("s3://bucket/run/")):
        assert root.name == "run"
        assert root.at("a").parent == root
        assert str(root.at("a")) == f"{root}/a"
        assert storage_of(root) is root
    assert storage_of("s3://bucket").parent == storage_of("s3://bucket")
    assert storage_of(f"file://{tmp_path}") == LocalStorage(tmp_path)
    assert [is_url(text) for text in ("s3://b/x", "/a/b", "file:///a", "a:b")] == [True, False, False, False]


def test_a_url_that_lacks_a_slash_is_no_folder():
    with pytest.raises(CheckpointError, match=r"s3:/bucket/run: .*Write s3://bucket/run"):
        storage_of("s3:/bucket/run")


def test_a_folder_that_refuses_to_be_synced(tmp_path, monkeypatch):
    """As SMB's and some FUSE's do; any other error is one."""
    answers = [22, 5]
    fsync = os.fsync

    def refuse(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            return fsync(handle)
        raise OSError(answers.pop(0), "no")

    monkeypatch.setattr(os, "fsync", refuse)
    storage_of(tmp_path).write("a", b"1")
    with pytest.raises(OSError, match="no"):
        storage_of(tmp_path).write("b", b"1")


def test_a_missing_library_is_named(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(object_storage.importlib, "import_module", missing)
    with pytest.raises(CheckpointError, match=r"s3:// is missing .*pip install -r requirements/s3\.txt"):
        storage_of("s3://bucket/run").files()
    with pytest.raises(CheckpointError, match=r"gs:// is missing .*pip install gcsfs"):
        storage_of("gs://bucket/run").files()


def test_an_unknown_kind_is_named():
    with pytest.raises(CheckpointError, match=r"no storage of this kind is known.*Write a folder, or a URL"):
        storage_of("s4://bucket/run").files()


def test_what_may_pass_is_tried_again_and_then_an_os_error(monkeypatch, caplog):
    monkeypatch.setattr(object_storage, "_WAITS", (0.0, 0.0))

    class ConnectTimeoutError(Exception):
        __module__ = "botocore.exceptions"

    failures = [ConnectTimeoutError("no answer")] * 2

    def action():
        if failures:
            raise failures.pop()
        return "done"

    assert object_storage._persistently(action, "s3://b/x") == "done"
    failures[:] = [ConnectTimeoutError("no answer")] * 3
    with pytest.raises(OSError, match=r"no answer: 's3://b/x'"):
        object_storage._persistently(action, "s3://b/x")
    failures[:] = [PermissionError(13, "denied")] * 3
    with pytest.raises(PermissionError):
        object_storage._persistently(action, "s3://b/x")
    assert len(failures) == 2
