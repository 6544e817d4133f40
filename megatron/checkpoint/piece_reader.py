"""Ranges of stored tensors, read by several threads straight to where they belong, each proved by its blocks.

What is contiguous is read block by block into the target itself, where that is memory of the same dtype, else through a
buffer of 4 MiB. What is not, since another number of tensor-parallel ranks wrote it, is taken out of a few rows at
a time. So reading needs `THREADS` such buffers beside its targets, whatever the size of a tensor.
Checkpoints of version 1, whose pieces are hashed whole, need a piece instead.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron.checkpoint.manifest import Manifest, Piece, TensorEntry, cannot_read, damage, pieces_of_shard, shards_of
from megatron.checkpoint.ranges import Columns, common_columns
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_file import DTYPES, read_into
from megatron.errors import CheckpointError, DamagedCheckpointError
from megatron.parallel.sharding import ShardSpec, StateRequest

THREADS, REMOTE_THREADS = 4, 16  # an object store answers late, and many at once
_CHUNK = 4 << 20  # bytes that a thread reads at once
_LONG = 1 << 20  # bytes; shorter runs in the rows of a tensor are read together with what lies between them
_WAITING = 256  # jobs that are planned before the first of them is done

Job = Callable[[], None]


class PieceReader:
    """Reads one checkpoint's pieces. bytes_read: so far, headers included; shared by all threads."""

    def __init__(self, folder: Storage, manifest: Manifest) -> None:
        self.bytes_read = 0
        self._folder = folder
        self._manifest = manifest
        self._lock, self._header_lock = threading.Lock(), threading.Lock()
        self._buffers = threading.local()
        self._proved: set[str] = set()
        self._shares: dict[tuple[str, str, int], _Share] = {}

    def fill(self, requests: Iterable[StateRequest]) -> None:
        """Fill the targets of all requests, whose tensors must be there.

        Raises DamagedCheckpointError with every file and piece that is not as it was written, and CheckpointError where
        some cannot be read now.
        """
        jobs = (job for request in requests for job in self._jobs(request))
        errors: list[CheckpointError] = []
        with ThreadPoolExecutor(THREADS if self._folder.local_path() else REMOTE_THREADS) as pool:
            while batch := list(islice(jobs, _WAITING)):
                found = pool.map(_outcome, batch) if len(batch) > 1 else map(_outcome, batch)
                errors.extend(error for error in found if error is not None)
        if errors:
            raise joined(errors)

    def _jobs(self, request: StateRequest) -> Iterator[Job]:
        """Yield what is to be done for one request; jobs do not depend on each other."""
        entry = self._manifest.tensors[request.kind][request.name]
        start, stop = request.start, request.start + request.target.numel()
        if start == stop:
            return
        size, spec = shards_of(entry), request.spec if request.shard[1] > 1 else ShardSpec(entry.dim, entry.blocks)
        assert size == 1 or (spec.dim, spec.blocks) == (entry.dim, entry.blocks), f"{request.name} is split otherwise"
        for columns in common_columns(entry.shape, spec, request.shard, size):
            share = self._share(request.kind, request.name, columns.rank)
            yield from self._rows(share, columns, request.target, start, stop)

    def _rows(self, share: _Share, columns: Columns, target: Tensor, start: int, stop: int) -> Iterator[Job]:
        whole = columns.whole_rows(start, stop)
        is_long = columns.length * share.dtype.itemsize >= _LONG
        for row in columns.cut_rows(start, stop) + (list(whole) if is_long or len(whole) == 1 else []):
            run = columns.clipped(row, start, stop)
            if run is not None:
                stored, wanted, length = run
                yield from self._chunks(share, stored, target.narrow(0, wanted - start, length))
        if is_long or len(whole) <= 1:
            return
        step = max(1, _CHUNK // (columns.stored_width * share.dtype.itemsize)) if self._manifest.hashing.block else 0
        for first in range(whole.start, whole.stop, step or len(whole)):
            rows = range(first, min(first + (step or len(whole)), whole.stop))
            yield partial(self._take_columns, share, columns, rows, target, start)

    def _take_columns(self, share: _Share, columns: Columns, rows: range, target: Tensor, start: int) -> None:
        """Read whole rows of a stored share and copy the common columns to the target."""
        first = rows.start * columns.stored_width + columns.stored_first
        span = self._buffer("rows", (len(rows) - 1) * columns.stored_width + columns.length, share.dtype)
        for job in self._chunks(share, first, span):
            job()
        size = (len(rows), columns.length)
        place = target.storage_offset() + rows.start * columns.wanted_width + columns.wanted_first - start
        target.as_strided(size, (columns.wanted_width, 1), place).copy_(
            span.as_strided(size, (columns.stored_width, 1))
        )

    def _chunks(self, share: _Share, first: int, target: Tensor) -> Iterator[Job]:
        """Yield the jobs that fill `target` with elements of a stored share from `first` on."""
        done = 0
        for piece, offset in share.pieces_from(first):
            stop = min(piece.length, offset + target.numel() - done)
            while offset < stop:
                end = self._end_of_chunk(offset, stop, piece.length, share.dtype.itemsize)
                yield partial(self._read, piece, offset, target.narrow(0, done, end - offset), share.dtype)
                offset, done = end, done + end - offset
            if done == target.numel():
                return

    def _end_of_chunk(self, offset: int, stop: int, length: int, itemsize: int) -> int:
        """Return up to where elements [offset, stop) of a piece are read at once: whole blocks, or a part of one."""
        block = self._manifest.hashing.block // itemsize
        if not block:
            return stop
        if offset % block or stop - offset < block:
            return min(stop, offset - offset % block + block)
        end = min(stop, offset + _CHUNK // itemsize)
        return end if end == length else end - end % block

    def _read(self, piece: Piece, offset: int, target: Tensor, dtype: torch.dtype) -> None:
        """Fill `target` with elements of one piece from `offset` on, and prove them."""
        self.prove_header(piece.file)
        start, stop = offset * dtype.itemsize, (offset + target.numel()) * dtype.itemsize
        first, last = self._manifest.hashing.around(start, stop, piece.length * dtype.itemsize)
        is_direct = (first, last) == (start, stop) and target.device.type == "cpu" and target.dtype == dtype
        values = target if is_direct else self._buffer("piece", (last - first) // dtype.itemsize, dtype)
        data: memoryview = values.view(torch.uint8).numpy().data
        self._fetch(piece.file, piece.offset + first, data)
        block = self._manifest.hashing.block
        wrong = self._manifest.hashing.wrong_block(data, piece.hashes, first // block if block else 0)
        if wrong is not None:
            place = f" (in bytes {wrong * block:,} to {(wrong + 1) * block:,} of them)" if wrong else ""
            why = f"The values of {piece.key} do not match their hash{place}."
            raise DamagedCheckpointError(damage(self._folder, piece.file, why))
        if not is_direct:
            begin = (start - first) // dtype.itemsize
            target.copy_(values.narrow(0, begin, target.numel()))

    def prove_header(self, name: str) -> None:
        """Compare the header of a file with its hash, once for each file."""
        with self._header_lock:
            if name not in self._proved:
                self._prove_header(name)

    def _prove_header(self, name: str) -> None:
        entry = self._manifest.files[name]
        header = bytearray(entry.header_size)
        self._fetch(name, 0, memoryview(header))
        if self._manifest.hashing.hash(header) != entry.header_hash:
            raise DamagedCheckpointError(damage(self._folder, name, "Its header does not match its hash."))
        self._proved.add(name)

    def _buffer(self, use: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory of this thread, which it uses again and again."""
        size = numel * dtype.itemsize
        held: Tensor | None = getattr(self._buffers, use, None)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8)
            setattr(self._buffers, use, held)
        return held[:size].view(dtype)

    def _fetch(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a file, or raise DamagedCheckpointError."""
        try:
            filled = self._read_into(name, offset, buffer)
        except OSError as error:
            raise cannot_read(self._folder, name, error) from error
        if filled < len(buffer):
            raise DamagedCheckpointError(damage(self._folder, name, f"It ends {len(buffer) - filled} bytes too early."))
        with self._lock:
            self.bytes_read += filled

    def _read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        path = self._folder.local_path(name)
        if path is not None:
            return read_into(path, offset, buffer)
        data = self._folder.read(name, offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _share(self, kind: str, name: str, rank: int) -> _Share:
        key = (kind, name, rank)
        if key not in self._shares:
            self._shares[key] = _Share.of(self._manifest.tensors[kind][name], rank)
        return self._shares[key]


@dataclass(frozen=True)
class _Share:
    """The pieces of one stored share of a tensor that hold anything, in flat order."""

    dtype: torch.dtype
    pieces: Sequence[Piece]
    starts: Sequence[int]

    @classmethod
    def of(cls, entry: TensorEntry, rank: int) -> _Share:
        pieces = [piece for piece in pieces_of_shard(entry, rank) if piece.length]
        return cls(DTYPES[entry.dtype], pieces, [piece.start for piece in pieces])

    def pieces_from(self, element: int) -> Iterator[tuple[Piece, int]]:
        """Yield (piece, its first element that counts) from an element of the share on."""
        index = bisect_right(self.starts, element) - 1
        for piece in islice(self.pieces, index, None):
            yield piece, max(0, element - piece.start)


def _outcome(job: Job) -> CheckpointError | None:
    """Do a job; return what stood against it."""
    try:
        with torch.no_grad():
            job()
    except CheckpointError as error:
        return error
    return None


def joined(errors: Sequence[CheckpointError]) -> CheckpointError:
    """Return several errors as one, which is damage where all of them are."""
    is_damage = all(isinstance(error, DamagedCheckpointError) for error in errors)
    problems = dict.fromkeys(problem for error in errors for problem in error.problems)
    return (DamagedCheckpointError if is_damage else CheckpointError)(*problems)
