"""Tensors as a stream of bytes, and the hashes of its blocks."""

from __future__ import annotations

import errno
import io

import pytest
import torch
import xxhash
from safetensors.torch import load

from megatron.checkpoint import tensor_file
from megatron.checkpoint.hashing import CURRENT, VERSION_1, Hashing
from megatron.checkpoint.tensor_file import write_tensor_file, write_tensors


def test_any_stream_becomes_a_safetensors_file_with_a_proof_of_each_block():
    large = torch.arange(CURRENT.block // 4 * 2 + 5, dtype=torch.float32)  # two blocks and 20 bytes
    tensors = [("small", torch.tensor([1, 2], dtype=torch.int8)), ("large", large), ("none", torch.zeros(0))]
    stream = io.BytesIO()
    written = write_tensors(stream, "a.safetensors", iter(tensors))
    data = stream.getvalue()
    assert (written.name, written.size) == ("a.safetensors", len(data))
    assert all(torch.equal(load(data)[key], tensor) for key, tensor in tensors)
    assert written.header_hash == xxhash.xxh3_128_hexdigest(data[: written.header_size])
    span = written.ranges[1]
    assert data[span.offset : span.offset + span.size] == large.numpy().tobytes()
    blocks = [data[span.offset + start : span.offset + stop] for start, stop in CURRENT.blocks(span.size)]
    assert [len(block) for block in blocks] == [CURRENT.block, CURRENT.block, 20]
    assert span.hashes == "".join(xxhash.xxh3_128_hexdigest(block) for block in blocks)
    assert written.ranges[2].hashes == ""


@pytest.mark.parametrize("hashing", [Hashing("xxh3_128", 8), Hashing("sha256", 8), VERSION_1])
def test_a_part_of_a_range_is_proved_by_its_blocks_alone(hashing):
    data = bytes(range(29))
    proof = hashing.proof(data)
    for start in range(29):
        for stop in range(start + 1, 30):
            first, last = hashing.around(start, stop, 29)
            assert first <= start
            assert stop <= last <= 29
            number = first // hashing.block if hashing.block else 0
            assert hashing.wrong_block(data[first:last], proof, number) is None
            damaged = bytearray(data[first:last])
            damaged[start - first] ^= 1
            wrong = start // hashing.block if hashing.block else 0
            assert hashing.wrong_block(damaged, proof, number) == wrong


def test_what_an_early_sync_finds_is_raised(tmp_path, monkeypatch):
    """The system tells of a failed write-back only once: the sync at the end would know nothing of it."""
    monkeypatch.setattr(tensor_file, "_SYNC_EVERY", 1)
    tensors = [("a", torch.ones(9)), ("b", torch.ones(9))]
    assert write_tensor_file(tmp_path / "good", tensors).size == (tmp_path / "good").stat().st_size

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensor_file(tmp_path / "bad", tensors)
