"""A safetensors file written as a stream: one tensor in memory at a time, hashed while it is written.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header padded with
spaces so that the data begins at a multiple of 8, then the raw values. Any safetensors reader opens the file; ours
reads single ranges by offset, so that a hash of each range is all the proof it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
_BLOCK = 8 << 20  # bytes
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class WrittenRange:
    """Where one tensor's bytes lie in a file, and the sha256 of them."""

    key: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class WrittenFile:
    """A whole file: its size in bytes, the sha256 of all bytes before the data, and the ranges in order."""

    name: str
    size: int
    header_size: int
    header_sha256: str
    ranges: tuple[WrittenRange, ...]


def write_tensor_file(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> WrittenFile:
    """Write `tensors` (key, values of any shape, on any device) to a new file and sync it to the disk.

    Returns the place and hash of every tensor. Raises OSError as the file system does (full, read-only ...).
    """
    header = _header(tensors)
    ranges, offset = [], len(header)
    with ThreadPoolExecutor(max_workers=1) as hasher, open(path, "xb") as file:
        file.write(header)
        for key, tensor in tensors:
            values = as_bytes(tensor)
            digest = hasher.submit(lambda data: hashlib.sha256(data).hexdigest(), values)
            file.write(values)
            ranges.append(WrittenRange(key, offset, len(values), digest.result()))
            offset += len(values)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, offset, len(header), hashlib.sha256(header).hexdigest(), tuple(ranges))


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


def read_range(path: Path, offset: int, size: int) -> bytearray:
    """Return `size` bytes at `offset`; fewer where the file ends before that."""
    values = bytearray(size)
    with open(path, "rb") as file:
        file.seek(offset)
        filled = file.readinto(values)
    return values if filled == size else values[:filled]


def hash_range(path: Path, offset: int, size: int) -> str:
    """Return the sha256 of `size` bytes at `offset`, or of those that are there, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while size > 0 and (block := file.read(min(size, _BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def from_bytes(values: bytearray, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor over `values`, which it shares."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
