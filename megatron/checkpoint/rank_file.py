"""The one file that a rank writes: its pieces, streamed and hashed, and the proof that the storage has them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron.checkpoint.hashing import CURRENT
from megatron.checkpoint.manifest import Piece, TensorEntry, merge_tensors
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_file import NAMES, WrittenFile, write_tensors
from megatron.errors import CheckpointError, Problem
from megatron.parallel.sharding import StatePiece

Table = dict[str, dict[str, TensorEntry]]

_LOCAL_WINDOW = 8 << 20  # bytes read at once to be compared
_REMOTE_WINDOW = 32 << 20  # of one request
_THREADS = 4


def write_rank_file(folder: Storage, name: str, owned: Sequence[StatePiece]) -> tuple[Table, WrittenFile]:
    """Write the pieces that a rank owns, read them back, and return their part of the manifest.

    Raises CheckpointError where other bytes come back than were written, OSError as the storage does.
    """
    listed = [(_key(piece), piece.data.reshape(-1)) for piece in owned]
    written = folder.write_stream(
        name, lambda file: write_tensors(file, name, listed), lambda done: verify(folder, done)
    )
    return _table(owned, written), written


def _key(piece: StatePiece) -> str:
    """Return the name of a piece within its file."""
    rank, size = piece.shard
    share = f"/shard{rank}of{size}" if size > 1 else ""
    return f"{piece.kind}/{piece.name}{share}/{piece.start}"


def _table(owned: Sequence[StatePiece], written: WrittenFile) -> Table:
    """Return this rank's part of the manifest's table of tensors."""
    parts: list[Table] = []
    for piece, span in zip(owned, written.ranges, strict=True):
        shape = list(piece.shape)
        if piece.spec.dim is not None:
            shape[piece.spec.dim] *= piece.shard[1]
        place = Piece(written.name, span.key, span.offset, piece.start, piece.data.numel(), span.hashes, piece.shard)
        entry = TensorEntry(tuple(shape), NAMES[piece.data.dtype], (place,), piece.spec.dim, piece.spec.blocks)
        parts.append({piece.kind: {piece.name: entry}})
    return merge_tensors(parts, whole=False)


@dataclass(frozen=True)
class _Block:
    """Bytes [start, stop) of a file and the proof of them."""

    start: int
    stop: int
    proof: str
    key: str


def verify(folder: Storage, written: WrittenFile) -> None:
    """Read a file back from the storage and compare it with the hashes of what was to be written.

    Of a local file, what is compared is what the operating system gives any other reader, while it is being synced.
    From an object store every byte is fetched again: checksums of stores differ in kind, and some have none.
    """
    window = _REMOTE_WINDOW if folder.local_path() is None else _LOCAL_WINDOW
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda blocks: _wrong(folder, written.name, blocks), _windows(_blocks(written), window))
        wrong = [key for keys in found for key in keys]
    if wrong:
        why = f"Reading it back gave other values than were written ({', '.join(wrong[:3])})."
        raise CheckpointError(
            Problem(f"checkpoint file {folder}/{written.name}", why, "Set save to a disk that works.")
        )


def _blocks(written: WrittenFile) -> Iterator[_Block]:
    """Yield the header and all blocks of all ranges, in the order of the file."""
    yield _Block(0, written.header_size, written.header_hash, "header")
    digits = len(written.header_hash)
    for span in written.ranges:
        for number, (start, stop) in enumerate(CURRENT.blocks(span.size)):
            proof = span.hashes[number * digits : (number + 1) * digits]
            yield _Block(span.offset + start, span.offset + stop, proof, span.key)


def _windows(blocks: Iterator[_Block], size: int) -> Iterator[list[_Block]]:
    """Yield runs of neighbouring blocks of at most about `size` bytes."""
    for _, run in itertools.groupby(blocks, key=lambda block: block.start // size):
        yield list(run)


def _wrong(folder: Storage, name: str, blocks: Sequence[_Block]) -> list[str]:
    """Read a run of blocks and return the keys of those that differ."""
    first = blocks[0].start
    values = memoryview(folder.read(name, first, blocks[-1].stop - first))
    return [b.key for b in blocks if CURRENT.hash(values[b.start - first : b.stop - first]) != b.proof]
