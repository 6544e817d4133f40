"""One save of one snapshot to one storage, by all ranks together; nothing that was good before is touched.

    free space -> a place of its own -> rank files, read back and compared with their hashes -> manifest
    -> it counts -> `latest` -> older checkpoints go, as retention says

A kill at any moment leaves the last good checkpoint, and at most leftovers that the next save removes.
"""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.checkpoint import contents, steps
from megatron.checkpoint.amounts import amount
from megatron.checkpoint.manifest import FileEntry, Manifest, merge_tensors, to_bytes
from megatron.checkpoint.publish import place_of
from megatron.checkpoint.rank_file import Table, write_rank_file
from megatron.checkpoint.retention import keep_earlier, prune
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_file import WrittenFile
from megatron.checkpoint.together import together
from megatron.checkpoint.topology import topology_of
from megatron.config.schema.config import Config
from megatron.errors import CheckpointError, Problem
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece

_SLACK = 16 << 20  # bytes kept free beyond the tensors, for the manifest, the YAML files and the tokenizer
_VISIBLE_SECONDS = 10.0  # how long a network file system may take to show rank 0's new folder to the other nodes

_Part = tuple[Table, WrittenFile | None]


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds of this rank: its pieces, and what the manifest says besides (alike on all ranks).

    extra: JSON values to keep; of these "tokenizer" ({"name", "fingerprint", "vocab_size"}) is kept as the manifest's
        own field, and "config_files" ({file name: text}) becomes files under configs/.
    """

    iteration: int
    pieces: Sequence[StatePiece]
    progress: Mapping[str, Any]
    config: Config
    extra: Mapping[str, Any]

    @cached_property
    def size(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(piece.data.numel() * piece.data.element_size() for piece in self.pieces)


def write_snapshot(
    snapshot: Snapshot, root: Storage, mesh: Mesh, keep_last: int | None, good: int | None = None
) -> Storage:
    """Write `<root>/global_step<iteration>` and return it; every rank of the mesh must call it.

    keep_last: how many checkpoints stay; None keeps all. good: an iteration whose checkpoint in `root` is known to be
    whole (the run saved it, or began from it): it stays until this one counts, as does the one that `latest` names.
    Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are intact then.
    """
    writer = _Writer(snapshot, root, mesh, keep_last, good)
    try:
        writer.begin()
        writer.finish(writer.write())
    except CheckpointError:
        writer.discard()
        raise
    if mesh.world.rank == 0:
        prune(root, snapshot.iteration, keep_last)
    return writer.place.final


class _Writer:
    """The steps of one save. Each is taken by all ranks together, and fails on all where it fails on one."""

    def __init__(self, snapshot: Snapshot, root: Storage, mesh: Mesh, keep_last: int | None, good: int | None) -> None:
        self.snapshot = snapshot
        self.root = root
        self.mesh = mesh
        self.keep_last = keep_last
        self.good = good
        self.place = place_of(root, snapshot.iteration)
        self._begun = False

    def begin(self) -> None:
        """Make the place of the new checkpoint, if what all ranks bring fits on the disk."""
        sizes = together(self.mesh, lambda: self.snapshot.size, self._explain)
        tokens = together(self.mesh, lambda: self._prepare(sum(sizes)), self._explain)
        self.place.follow(tokens[0])

    def _prepare(self, total: int) -> str:
        if self.mesh.world.rank != 0:
            return ""
        self.root.make()
        steps.clean_leftovers(self.root)
        if self.keep_last is not None:  # which may be lower than before; one stays until this one is safe
            good = (self.good, steps.latest_step(self.root))
            keep_earlier(self.root, self.snapshot.iteration, max(1, self.keep_last), good)
        free = self.root.free()
        if free is not None and free < total + _SLACK:
            why = f"The checkpoint needs {amount(total)} and {amount(_SLACK)} besides for what describes it; "
            raise CheckpointError(self._disk_full(f"{why}{amount(free)} are free."))
        self._begun = True
        return self.place.begin()

    def write(self) -> list[_Part]:
        """Write and verify this rank's file; return what every rank wrote."""
        return together(self.mesh, self._write_own, self._explain)

    def _write_own(self) -> _Part:
        self._require_visible()
        owned = self.snapshot.pieces
        if not owned:
            return {}, None
        return write_rank_file(self.place.folder, self.place.rank_file(self.mesh.world.rank), owned)

    def _require_visible(self) -> None:
        """Wait for the folder that rank 0 made; raise where this node does not share the storage."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not self.place.folder.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    Problem(
                        what=f"save = {self.root}",
                        why=f"Rank {self.mesh.world.rank} on {platform.node()} does not see the folder of rank 0.",
                        fix="Set save to a folder on a file system that all nodes share.",
                    )
                )
            time.sleep(0.1)

    def finish(self, parts: Sequence[_Part]) -> None:
        """Describe the checkpoint and let it count (rank 0); the others wait for the outcome."""
        together(self.mesh, lambda: self._finish(parts), self._explain)

    def _finish(self, parts: Sequence[_Part]) -> None:
        if self.mesh.world.rank != 0:
            return
        snapshot, folder, extra = self.snapshot, self.place.folder, dict(self.snapshot.extra)
        files = contents.copy_tokenizer(snapshot.config, folder)
        tokenizer = {**extra.pop("tokenizer", {}), "files": files}
        contents.write_yaml(folder, snapshot.config, extra.pop("config_files", None) or {})
        written = [file for _, file in parts if file is not None]
        self._require_files([file.name for file in written])
        manifest = Manifest(
            iteration=snapshot.iteration,
            tensors=merge_tensors(table for table, _ in parts),
            files={file.name: FileEntry(file.size, file.header_size, file.header_hash) for file in written},
            progress=dict(snapshot.progress),
            config=snapshot.config.model_dump(mode="json"),
            tokenizer=tokenizer,
            versions=contents.versions(),
            topology=topology_of(self.mesh, snapshot.config),
            extra=extra,
        )
        self.place.publish(to_bytes(manifest))
        steps.set_latest(self.root, snapshot.iteration)

    def _require_files(self, names: Sequence[str]) -> None:
        """Raise where a file that a rank has written is not there: a manifest would promise what nobody has."""
        missing = sorted(set(names) - set(self.place.folder.files()))
        if missing:
            why = f"{missing[0]} has been written, and is gone: another run may save here, or clean up."
            fix = "See that nothing else writes to or deletes in this folder; earlier checkpoints are intact."
            raise CheckpointError(Problem(f"checkpoint {self.place.final}", why, fix))

    def discard(self) -> None:
        """Remove what a failed save wrote, so that its room is free again."""
        if self._begun:
            self.place.discard()

    def _explain(self, error: OSError) -> Problem:
        """Return the problem behind an error of the storage."""
        why = f"{error.strerror or error} ({error.filename or self.root})."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._disk_full(f"The disk became full while it was written ({error.strerror}).")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "Give this user the right to write there, or set another save."
            return Problem(f"save = {self.root}", f"The folder cannot be written ({why[:-1]}).", fix)
        fix = "Set save to a folder on a disk that works."
        if self.root.local_path() is None:
            fix = "See that the bucket exists and the store answers; earlier checkpoints there are intact."
        return Problem(f"checkpoint {self.place.final}", why, fix)

    def _disk_full(self, why: str) -> Problem:
        names = [folder.name for folder in steps.whole_steps(self.root).values()]
        oldest = f", delete old checkpoints ({', '.join(names[:-1][:4])})" if len(names) > 1 else ""
        intact = f" The earlier ones are intact, the last is {names[-1]}." if names else ""
        fix = f"Free some space{oldest}, set keep_last_n_checkpoints lower, or set save to another disk.{intact}"
        return Problem(f"checkpoint {self.place.final}", why, fix)
