"""Saving: every rank writes the pieces it owns; nothing that was good before is touched until all of it is proved.

    free space -> .writing_global_step<N>/ -> rank files, synced, read back and compared with their hashes
    -> manifest -> rename to global_step<N> -> `latest` -> older checkpoints go, as retention says

A kill at any moment leaves the last good checkpoint, and at most a `.writing_` folder that the next save removes.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron import logs
from megatron.checkpoint import contents, layout
from megatron.checkpoint.hashing import CURRENT
from megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    merge_tensors,
    write_manifest,
)
from megatron.checkpoint.retention import keep_earlier, prune
from megatron.checkpoint.tensor_file import NAMES, WrittenFile, hash_range, read_range, write_tensor_file
from megatron.checkpoint.together import together
from megatron.config.schema.config import Config
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece

logger = logs.get_logger(__name__)

_SLACK = 16 << 20  # bytes kept free beyond the tensors, for the manifest, the YAML files and the tokenizer
_VISIBLE_SECONDS = 10.0  # how long a network file system may take to show rank 0's new folder to the other nodes
_HASH_THREADS = 4


def save_checkpoint(
    root: Path | str,
    iteration: int,
    pieces: Iterable[StatePiece],
    progress: Mapping[str, Any],
    config: Config,
    extra: Mapping[str, Any] | None,
    mesh: Mesh,
    keep_last: int | None = None,
) -> Path:
    """Write `<root>/global_step<iteration>` and return it; every rank of the mesh must call it.

    pieces: what this rank owns. They are held until written, so they should be views of the live state.
    progress: counts of the training loop, JSON values.
    extra: further JSON values to keep; of these "tokenizer" ({"name", "fingerprint", "vocab_size"}) is kept as the
        manifest's own field, and "config_files" ({file name: text}) becomes files under configs/.
    keep_last: how many checkpoints stay; None takes `keep_last_n_checkpoints` of the config.
    Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are intact then.
    """
    started = time.perf_counter()
    root = Path(root)
    owned = [piece for piece in pieces if _wanted(piece, config)]
    keep_last = config.checkpoint.keep_last_n_checkpoints if keep_last is None else keep_last
    writer = _Writer(root, iteration, mesh, keep_last)
    try:
        writer.begin(sum(piece.data.numel() * piece.data.element_size() for piece in owned))
        parts = writer.write(owned)
        final = writer.finish(parts, progress, config, dict(extra or {}))
    except CheckpointError:
        writer.discard()
        raise
    if mesh.world.rank == 0:
        prune(root, iteration, keep_last)
        logger.info("saved %s in %.1f s", final, time.perf_counter() - started)
    return final


def _wanted(piece: StatePiece, config: Config) -> bool:
    """Leave out empty ranges, and the optimizer's state and masters under `no_save_optim`."""
    return piece.data.numel() > 0 and (piece.kind == "weight" or not config.checkpoint.no_save_optim)


class _Writer:
    """The steps of one save. Each is taken by all ranks together, and fails on all where it fails on one."""

    def __init__(self, root: Path, iteration: int, mesh: Mesh, keep_last: int | None) -> None:
        self.root = root
        self.mesh = mesh
        self.iteration = iteration
        self.keep_last = keep_last
        self.final = root / layout.step_name(iteration)
        self.temporary = root / f"{layout.WRITING}{self.final.name}"

    def begin(self, size: int) -> None:
        """Make the temporary folder, if `size` bytes of this rank and those of the others fit on the disk."""
        sizes = together(self.mesh, lambda: size, self._explain)
        together(self.mesh, lambda: self._prepare(sum(sizes)), self._explain)

    def _prepare(self, total: int) -> None:
        if self.mesh.world.rank != 0:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        clean_leftovers(self.root)
        if self.keep_last is not None:  # which may be lower than before; one stays until this one is safe
            keep_earlier(self.root, self.iteration, max(1, self.keep_last))
        free = shutil.disk_usage(self.root).free
        if free < total + _SLACK:
            why = f"The checkpoint needs {_amount(total)} and {_amount(_SLACK)} besides for what describes it; "
            raise CheckpointError(_disk_full(self.final, f"{why}{_amount(free)} are free."))
        self.temporary.mkdir()

    def write(self, owned: Sequence[StatePiece]) -> list[tuple[_Table, WrittenFile | None]]:
        """Write and verify this rank's file; return what every rank wrote."""
        return together(self.mesh, lambda: self._write_own(owned), self._explain)

    def _write_own(self, owned: Sequence[StatePiece]) -> tuple[_Table, WrittenFile | None]:
        self._require_visible()
        if not owned:
            return {}, None
        path = self.temporary / layout.rank_file(self.mesh.world.rank)
        written = write_tensor_file(path, [(_key(piece), piece.data.reshape(-1)) for piece in owned])
        _verify(path, written)
        return _table(owned, written), written

    def _require_visible(self) -> None:
        """Wait for the folder that rank 0 made; raise where this node does not share the file system."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not self.temporary.is_dir():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    Problem(
                        what=f"save = {self.root}",
                        why=f"Rank {self.mesh.world.rank} on {platform.node()} does not see the folder of rank 0.",
                        fix="Set save to a folder on a file system that all nodes share.",
                    )
                )
            time.sleep(0.1)

    def finish(
        self,
        parts: Sequence[tuple[_Table, WrittenFile | None]],
        progress: Mapping[str, Any],
        config: Config,
        extra: dict[str, Any],
    ) -> Path:
        """Write the manifest and put the checkpoint in its place (rank 0); the others wait for the outcome."""
        together(self.mesh, lambda: self._finish(parts, progress, config, extra), self._explain)
        return self.final

    def _finish(
        self,
        parts: Sequence[tuple[_Table, WrittenFile | None]],
        progress: Mapping[str, Any],
        config: Config,
        extra: dict[str, Any],
    ) -> None:
        if self.mesh.world.rank != 0:
            return
        tokenizer = {**extra.pop("tokenizer", {}), "files": contents.copy_tokenizer(config, self.temporary)}
        contents.write_yaml(self.temporary, config, extra.pop("config_files", None) or {})
        written = [file for _, file in parts if file is not None]
        manifest = Manifest(
            iteration=self.iteration,
            tensors=merge_tensors(table for table, _ in parts),
            files={file.name: FileEntry(file.size, file.header_size, file.header_hash) for file in written},
            progress=dict(progress),
            config=config.model_dump(mode="json"),
            tokenizer=tokenizer,
            versions=contents.versions(),
            topology={axis: getattr(self.mesh, axis).size for axis in ("dp", "tp", "pp", "cp", "world")},
            extra=extra,
        )
        write_manifest(manifest, self.temporary)
        self._move_into_place()
        layout.write_latest(self.root, self.iteration)

    def _move_into_place(self) -> None:
        """Rename the temporary folder; a checkpoint of the same iteration steps aside until that is done."""
        aside = self.root / f"{layout.REPLACED}{self.final.name}"
        if self.final.exists():
            os.rename(self.final, aside)
        os.rename(self.temporary, self.final)
        layout.sync_folder(self.root)
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove what a failed save wrote, so that its room is free again."""
        if self.mesh.world.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _explain(self, error: OSError) -> Problem:
        """Return the problem behind an error of the file system."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full(self.final, f"The disk became full while it was written ({error.strerror}).")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = f"The folder cannot be written ({error.strerror}: {error.filename or self.root})."
            return Problem(f"save = {self.root}", why, "Give this user the right to write there, or set another save.")
        why = f"{error.strerror or error} ({error.filename or self.root})."
        return Problem(f"checkpoint {self.final}", why, "Set save to a folder on a disk that works.")


_Table = dict[str, dict[str, TensorEntry]]


def _key(piece: StatePiece) -> str:
    """Return the name of a piece within its file."""
    rank, size = piece.shard
    share = f"/shard{rank}of{size}" if size > 1 else ""
    return f"{piece.kind}/{piece.name}{share}/{piece.start}"


def _table(owned: Sequence[StatePiece], written: WrittenFile) -> _Table:
    """Return this rank's part of the manifest's table of tensors."""
    parts: list[_Table] = []
    for piece, span in zip(owned, written.ranges, strict=True):
        shape = list(piece.shape)
        if piece.spec.dim is not None:
            shape[piece.spec.dim] *= piece.shard[1]
        place = Piece(written.name, span.key, span.offset, piece.start, piece.data.numel(), span.hashes, piece.shard)
        entry = TensorEntry(tuple(shape), NAMES[piece.data.dtype], (place,), piece.spec.dim, piece.spec.blocks)
        parts.append({piece.kind: {piece.name: entry}})
    return merge_tensors(parts, whole=False)


def _verify(path: Path, written: WrittenFile) -> None:
    """Read the file back and compare it with the hashes of what was to be written."""
    header = CURRENT.hash(read_range(path, 0, written.header_size))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        found = pool.map(lambda span: hash_range(path, span.offset, span.size), written.ranges)
        wrong = [span.key for span, digest in zip(written.ranges, found, strict=True) if digest != span.hashes]
    if wrong or header != written.header_hash:
        why = f"Reading it back gave other values than were written ({', '.join(wrong[:3]) or 'header'})."
        raise CheckpointError(Problem(f"checkpoint file {path}", why, "Set save to a disk that works."))


def clean_leftovers(root: Path) -> None:
    """Remove what killed saves left behind; a checkpoint that had stepped aside and was not replaced comes back."""
    for prefix in (layout.WRITING, layout.DELETED):
        for folder in layout.list_steps(root, prefix).values():
            shutil.rmtree(folder)
    whole = layout.list_steps(root)
    for iteration, folder in layout.list_steps(root, layout.REPLACED).items():
        if iteration in whole:
            shutil.rmtree(folder)
        else:
            os.rename(folder, root / layout.step_name(iteration))


def _disk_full(final: Path, why: str) -> Problem:
    steps = [folder.name for folder in layout.list_steps(final.parent).values()]
    oldest = f", delete old checkpoints ({', '.join(steps[:-1][:4])})" if len(steps) > 1 else ""
    intact = f" The earlier ones are intact, the last is {steps[-1]}." if steps else ""
    fix = f"Free some space{oldest}, set keep_last_n_checkpoints lower, or set save to another disk.{intact}"
    return Problem(f"checkpoint {final}", why, fix)


def _amount(size: int) -> str:
    """Return a number of bytes for a person."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
