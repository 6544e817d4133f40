"""Saving in the foreground: every rank writes the pieces it owns, and training waits.

save_checkpoint("checkpoints/pile", iteration, engine.state_pieces(), progress, config, extra, mesh)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron import logs
from megatron.checkpoint.storage import Storage, storage_of
from megatron.checkpoint.writer import Snapshot, write_snapshot
from megatron.config.schema.config import Config
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece

logger = logs.get_logger(__name__)


def take_snapshot(
    iteration: int,
    pieces: Iterable[StatePiece],
    progress: Mapping[str, Any],
    config: Config,
    extra: Mapping[str, Any] | None,
) -> Snapshot:
    """Return what a checkpoint of this moment holds. The pieces are views of the live state: no copy is made.

    Left out are empty ranges, and the optimizer's state and masters under `no_save_optim`.
    """
    no_optimizer = config.checkpoint.no_save_optim
    owned = [p for p in pieces if p.data.numel() > 0 and (p.kind == "weight" or not no_optimizer)]
    return Snapshot(iteration, owned, progress, config, dict(extra or {}))


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

    root: a folder. pieces: what this rank owns. progress: counts of the training loop, JSON values.
    extra: as in `Snapshot`. keep_last: how many checkpoints stay; None takes `keep_last_n_checkpoints` of the config.
    Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are intact then.
    """
    keep_last = config.checkpoint.keep_last_n_checkpoints if keep_last is None else keep_last
    snapshot = take_snapshot(iteration, pieces, progress, config, extra)
    save_snapshot(snapshot, storage_of(Path(root)), mesh, keep_last)
    return Path(root) / f"global_step{iteration}"


def save_snapshot(snapshot: Snapshot, root: Storage, mesh: Mesh, keep_last: int | None) -> Storage:
    """Write a snapshot and say how long it took; see `write_snapshot`."""
    started = time.perf_counter()
    folder = write_snapshot(snapshot, root, mesh, keep_last)
    if mesh.world.rank == 0:
        logger.info("saved %s in %.1f s", folder, time.perf_counter() - started)
    return folder
