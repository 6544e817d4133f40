"""A safetensors file written as a stream: one tensor on the host at a time, hashed block by block while it is written.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header padded with
spaces so that the data begins at a multiple of 8, then the raw values. Any safetensors reader opens the file; ours
reads single ranges by offset, so that the hashes of a range's blocks are all the proof it needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.hashing import CURRENT

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SYNC_EVERY = 32 << 20  # bytes
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class WrittenRange:
    """Where one tensor's bytes lie in a file, and their proof (see `megatron.checkpoint.hashing`)."""

    key: str
    offset: int
    size: int
    hashes: str


@dataclass(frozen=True)
class WrittenFile:
    """A whole file: its size in bytes, the hash of all bytes before the data, and the ranges in order."""

    name: str
    size: int
    header_size: int
    header_hash: str
    ranges: tuple[WrittenRange, ...]


def write_tensors(file: BinaryIO, name: str, tensors: Iterable[tuple[str, Tensor]]) -> WrittenFile:
    """Write `tensors` (key, values of any shape, on any device) to a buffered binary stream, in order, once.

    name: what the file is called, for the result. The stream is neither synced nor closed.
    Returns the place and the proof of every tensor. Raises OSError as the stream does (full, read-only ...).
    """
    listed = list(tensors)
    header = _header(listed)
    file.write(header)
    ranges, offset = [], len(header)
    with _EarlySync(file) as sync:
        for key, tensor in listed:
            values = as_bytes(tensor)
            ranges.append(WrittenRange(key, offset, len(values), _write_hashed(file, values, sync)))
            offset += len(values)
    return WrittenFile(name, offset, len(header), CURRENT.hash(header), tuple(ranges))


def _write_hashed(file: BinaryIO, values: memoryview, sync: _EarlySync) -> str:
    """Write a range block by block, each from the cache into which its hash has just brought it; return the proof."""
    hashes = []
    for start, stop in CURRENT.blocks(len(values)):
        hashes.append(CURRENT.hash(values[start:stop]))
        file.write(values[start:stop])
        sync.wrote(stop - start)
    return "".join(hashes)


class _EarlySync:
    """Has the system write to the disk what a file was given, while more is given to it.

    Otherwise it may do nothing of it until the file is synced at the end, and both times add up. A stream that is no
    file of this machine is left alone. What fails is raised, since the system tells of it only once.
    """

    def __init__(self, file: BinaryIO) -> None:
        try:
            self._handle: int | None = file.fileno()
        except (OSError, AttributeError):
            self._handle = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[None] | None = None
        self._waiting = 0

    def wrote(self, size: int) -> None:
        """Take note of bytes that were written, and begin to sync where there are many."""
        self._waiting += size
        if self._handle is None or self._waiting < _SYNC_EVERY:
            return
        if self._under_way is not None:
            if not self._under_way.done():
                return
            self._under_way.result()
        self._under_way, self._waiting = self._thread.submit(_sync, self._handle), 0

    def __enter__(self) -> _EarlySync:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None and self._under_way is not None:
            self._under_way.result()


def _sync(handle: int) -> None:
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS has no fdatasync


def write_tensor_file(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> WrittenFile:
    """Write `tensors` to a new file as `write_tensors` does, and sync it to the disk."""
    with open(path, "xb") as file:
        written = write_tensors(file, path.name, tensors)
        file.flush()
        os.fsync(file.fileno())
    return written


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """Return the length prefix and the padded JSON header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        assert key not in entries, f"two tensors are called {key}"
        entries[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as contiguous bytes on the host, without a copy where they already are."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    values: memoryview = flat.view(torch.uint8).numpy().data
    return values


def read_into(path: Path, offset: int, buffer: memoryview) -> int:
    """Fill a buffer with the bytes at `offset`; return how many there were, fewer where the file ends before that."""
    filled = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
            filled += count
    return filled
