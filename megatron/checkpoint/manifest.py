"""`manifest.json`: everything a reader has to know before it opens a tensor file, under one checksum.

A tensor is known by its canonical name and its kind ("weight", "master", "exp_avg" ...). Its pieces are flat
ranges of the full tensor, or of its shares along the tensor axis, in any number of files; nothing here depends on
how many processes wrote them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.checkpoint.hashing import CURRENT, VERSION_1, Hashing
from megatron.checkpoint.layout import MANIFEST
from megatron.checkpoint.storage import Storage
from megatron.errors import CheckpointError, DamagedCheckpointError, Problem

FORMAT = "deepy checkpoint"
VERSION = 2


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of the flat share `shard` of a tensor, at `offset` bytes of `file`.

    hashes: the proof of its bytes, as the manifest's `hashing` makes it.
    """

    file: str
    key: str
    offset: int
    start: int
    length: int
    hashes: str
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: full shape, safetensors dtype name, how shares lie along the tensor axis, and all its pieces."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    dim: int | None = None
    blocks: int = 1


@dataclass(frozen=True)
class FileEntry:
    """Size of a file in bytes and the hash of its header, the part that no piece covers."""

    size: int
    header_size: int
    header_hash: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    tensors: kind -> canonical name -> entry.
    progress: iteration, consumed samples and tokens ..., as the training loop counts them.
    config: the resolved config, one mapping per section.
    tokenizer: name, fingerprint and files of the tokenizer; {} where none was given.
    versions: of Python and of the libraries that wrote it.
    topology: sizes of the axes that wrote it, for information only.
    hashing: how files and pieces are hashed.
    """

    iteration: int
    tensors: Mapping[str, Mapping[str, TensorEntry]]
    files: Mapping[str, FileEntry]
    progress: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    topology: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    hashing: Hashing = CURRENT

    @property
    def size(self) -> int:
        """Bytes of all tensor files."""
        return sum(entry.size for entry in self.files.values())


def to_bytes(manifest: Manifest) -> bytes:
    """Return the content of `manifest.json`."""
    body = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}))  # as it will be read
    body["checksum"] = _checksum(body)
    return json.dumps(body, indent=1).encode()


def read_manifest(folder: Storage) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises DamagedCheckpointError where it is missing, not ours, or not as it was written, and CheckpointError where it
    cannot be read, or is of a later version.
    """
    path = f"{folder}/{MANIFEST}"
    try:
        body = json.loads(folder.read(MANIFEST).decode())
    except OSError as error:
        raise cannot_read(folder, MANIFEST, error) from error
    except ValueError as error:
        raise _damaged(path, f"It is not JSON ({error}).") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(path, "It is not the manifest of a checkpoint of this library.")
    _require_version(path, body.get("version"))
    if body.pop("checksum", None) != _checksum(body):
        raise _damaged(path, "Its content does not match its checksum: it was changed after it was written.")
    return _from_json(path, body)


def _checksum(body: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of everything but the checksum itself."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_version(path: str, version: object) -> None:
    if isinstance(version, int) and 1 <= version <= VERSION:
        return
    raise CheckpointError(
        Problem(
            where=path,
            what=f"version = {version}",
            why=f"This installation reads checkpoint versions 1 to {VERSION}; a later one wrote this.",
            fix="Update the library to the version that wrote the checkpoint, or load another checkpoint.",
        )
    )


def _damaged(path: str, why: str) -> CheckpointError:
    return DamagedCheckpointError(
        Problem(where=path, what="damaged manifest", why=why, fix="Load another checkpoint, or restore it from a copy.")
    )


def cannot_read(folder: Storage, name: str, error: OSError) -> CheckpointError:
    """Return the error of a file of a checkpoint that cannot be read: damage, unless it may be read at another time."""
    why = f"It cannot be read ({error.strerror or error})."
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpointError(damage(folder, name, "The file is missing."))
    if folder.local_path() is None or isinstance(error, PermissionError):
        fix = "See that this user may read it, and that its storage answers; then start again."
        return CheckpointError(Problem(where=f"{folder}/{name}", what="checkpoint", why=why, fix=fix))
    return DamagedCheckpointError(damage(folder, name, why))


def damage(folder: Storage, name: str, why: str) -> Problem:
    """Return the problem of a file of a checkpoint that is not as it was written."""
    fix = "No other complete checkpoint lies beside it: restore the file from a copy."
    return Problem(where=f"{folder}/{name}", what="damaged checkpoint", why=why, fix=fix)


def _from_json(path: str, body: Mapping[str, Any]) -> Manifest:
    """Build the manifest from checked JSON."""
    hashing = Hashing(**body["hashing"]) if "hashing" in body else VERSION_1
    if not hashing.is_known:
        raise _damaged(path, f"Its hashes are of an unknown kind, {hashing.name}.")
    tensors = {
        kind: {name: _tensor_from_json(entry) for name, entry in entries.items()}
        for kind, entries in body["tensors"].items()
    }
    rest = {key: body[key] for key in ("progress", "config", "tokenizer", "versions", "topology", "extra")}
    files = {name: FileEntry(**_renamed(entry)) for name, entry in body["files"].items()}
    return Manifest(iteration=body["iteration"], tensors=tensors, files=files, hashing=hashing, **rest)


def _tensor_from_json(entry: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(Piece(**{**_renamed(piece), "shard": tuple(piece["shard"])}) for piece in entry["pieces"])
    return TensorEntry(tuple(entry["shape"]), entry["dtype"], pieces, entry["dim"], entry["blocks"])


_OLD_NAMES = {"sha256": "hashes", "header_sha256": "header_hash"}  # of version 1


def _renamed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with the names of this version."""
    return {_OLD_NAMES.get(key, key): value for key, value in entry.items()}


def merge_tensors(
    parts: Iterable[Mapping[str, Mapping[str, TensorEntry]]], whole: bool = True
) -> dict[str, dict[str, TensorEntry]]:
    """Join what several ranks wrote into one table.

    whole: check that each tensor is whole, without a gap and with nothing twice.
    Raises AssertionError where the engine handed out pieces that do not tile their tensor: a bug of ours.
    """
    joined: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        for kind, entries in part.items():
            table = joined.setdefault(kind, {})
            for name, entry in entries.items():
                table[name] = _join(name, table[name], entry) if name in table else entry
    for kind, table in joined.items() if whole else ():
        for name, entry in table.items():
            _require_whole(f"{kind} of {name}", entry)
    return joined


def _join(name: str, first: TensorEntry, second: TensorEntry) -> TensorEntry:
    """Return one entry with the pieces of both."""
    same = (first.shape, first.dtype, first.dim, first.blocks) == (
        second.shape,
        second.dtype,
        second.dim,
        second.blocks,
    )
    assert same, f"{name} was written as {first.dtype} {first.shape} and as {second.dtype} {second.shape}"
    return TensorEntry(first.shape, first.dtype, first.pieces + second.pieces, first.dim, first.blocks)


def _require_whole(what: str, entry: TensorEntry) -> None:
    size = shards_of(entry)
    for rank in range(size):
        expected = math.prod(share_shape(entry, size))
        position = 0
        for piece in pieces_of_shard(entry, rank):
            assert piece.start == position, f"{what}: pieces meet badly at element {position} (next: {piece.start})"
            position += piece.length
        assert position == expected, f"{what}: pieces cover {position} of {expected} elements"


def shards_of(entry: TensorEntry) -> int:
    """Return over how many shares along the tensor axis the pieces are spread; 1 for full tensors."""
    sizes = {piece.shard[1] for piece in entry.pieces}
    assert len(sizes) == 1, f"pieces of different tensor-parallel sizes {sorted(sizes)}"
    return sizes.pop()


def pieces_of_shard(entry: TensorEntry, rank: int) -> Sequence[Piece]:
    """Return the pieces of one share in flat order."""
    return sorted((piece for piece in entry.pieces if piece.shard[0] == rank), key=lambda piece: piece.start)


def share_shape(entry: TensorEntry, size: int) -> tuple[int, ...]:
    """Return the shape of one of `size` shares of the tensor."""
    shape = list(entry.shape)
    if entry.dim is not None:
        shape[entry.dim] //= size
    return tuple(shape)
