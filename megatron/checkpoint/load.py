"""Loading: find the checkpoint or stop with a list of what is there; read just what is asked for, proved by hashes.

reader = CheckpointReader(find_checkpoint("checkpoints/pile"))     # or "s3://bucket/pile"
weight = reader.read("layers.0.mlp.linear1.weight", "weight")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from megatron import logs
from megatron.checkpoint import layout
from megatron.checkpoint.manifest import Manifest, cannot_read, damage, read_manifest
from megatron.checkpoint.piece_reader import PieceReader, joined
from megatron.checkpoint.steps import latest_step, readable_steps
from megatron.checkpoint.storage import Storage, storage_of
from megatron.checkpoint.tensor_file import DTYPES
from megatron.errors import CheckpointError, DamagedCheckpointError, DeepyError, Problem
from megatron.parallel.sharding import StateRequest

logger = logs.get_logger(__name__)

_MOST_SEARCHED = 20  # folders near a wrong one that are looked into


def find_checkpoint(root: Path | str | Storage, iteration: int | None = None) -> Storage:
    """Return the folder of the checkpoint that `latest` names, or of the given iteration.

    root: the `save` folder of a run or its URL, or one `global_step<N>` folder itself.
    Raises CheckpointError that lists what is there instead. It never returns without a checkpoint.
    """
    root = storage_of(root)
    try:
        return _find(root, iteration)
    except OSError as error:
        why = f"It cannot be read ({error.strerror or error})."
        fix = "See that this user may read it, and that its storage answers."
        raise CheckpointError(Problem(f"load = {root}", why, fix)) from error


def _find(root: Storage, iteration: int | None) -> Storage:
    if root.size(layout.MANIFEST) is not None:
        return _exactly(root, iteration)
    found = readable_steps(root)
    if not found:
        raise _nothing_there(root)
    wanted = iteration if iteration is not None else latest_step(root)
    if wanted is None:
        wanted = max(found)
        state = "names no checkpoint in its file" if root.exists(layout.LATEST) else "has no file"
        logger.info("%s %s `latest`: taking its newest, %s", root, state, layout.step_name(wanted))
    if wanted not in found:
        source = "iteration" if iteration is not None else f"{root}/{layout.LATEST}"
        raise CheckpointError(
            Problem(
                what=f"{source} = {wanted}",
                why=f"{root} holds no checkpoint of this iteration. There are: {', '.join(map(str, found))}.",
                fix=f"Choose one of them, for example iteration: {max(found)}.",
            )
        )
    return found[wanted]


def _exactly(folder: Storage, iteration: int | None) -> Storage:
    """Return a folder that is a checkpoint itself, if it is of the wanted iteration."""
    if iteration is not None and folder.name != layout.step_name(iteration):
        raise CheckpointError(
            Problem(
                what=f"iteration = {iteration}",
                why=f"{folder} is one checkpoint, of another iteration.",
                fix=f"Name its parent folder: load: {folder.parent}",
            )
        )
    return folder


def _nothing_there(root: Storage) -> CheckpointError:
    """Return the error for a folder without checkpoints, saying what it is or what is nearby."""
    local = root.local_path()
    foreign = layout.foreign_kind(local) if local is not None else None
    if foreign:
        return CheckpointError(Problem(f"load = {root}", "It is not a checkpoint of this library.", foreign))
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    missing = "It holds no checkpoint" if place == root else "There is no such folder"
    folders = place.folders()
    names = sorted([f"{name}/" for name in folders] + [name for name in place.files() if name != layout.LOCK])
    if root.local_path() is None and not place.exists():
        fix = "See that its name is right, and that this user may list it."
        return CheckpointError(Problem(f"load = {root}", f"There is no such bucket or folder: {place}.", fix))
    inside = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    near = [str(place.at(name)) for name in folders[:_MOST_SEARCHED] if readable_steps(place.at(name))]
    fix = f"Set load to {' or '.join(near[:3])}." if near else "Set load to a folder that holds global_step<N> folders."
    return CheckpointError(Problem(f"load = {root}", f"{missing}. {place} holds: {inside or 'nothing'}.", fix))


class CheckpointReader:
    """One checkpoint folder. Opening it reads the manifest and compares the sizes of all files, nothing else."""

    def __init__(self, folder: Path | str | Storage) -> None:
        self.folder = storage_of(folder)
        try:
            self.manifest: Manifest = read_manifest(self.folder)
            self._check_sizes()
            self._pieces = PieceReader(self.folder, self.manifest)
        except CheckpointError as error:
            raise self._with_alternative(error) from error

    def names(self, kind: str = "weight") -> list[str]:
        """Return the canonical names of all tensors of a kind; [] where the checkpoint has none of it."""
        return list(self.manifest.tensors.get(kind, {}))

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensors that are there: "weight", and where saved "master", "exp_avg" ..."""
        return list(self.manifest.tensors)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> full shape of every weight."""
        return {name: entry.shape for name, entry in self.manifest.tensors.get("weight", {}).items()}

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """Return the stored dtype of a tensor that is there."""
        return DTYPES[self.manifest.tensors[kind][name].dtype]

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...] | None:
        """Return the full shape of a tensor, or None where the checkpoint does not have it."""
        entry = self.manifest.tensors.get(kind, {}).get(name)
        return entry.shape if entry else None

    def fill(self, requests: Iterable[StateRequest]) -> None:
        """Fill every request's target with its range of a tensor that is there, reading just what that needs.

        Raises DamagedCheckpointError where bytes are not those that were written; targets are then undefined.
        """
        try:
            self._pieces.fill(requests)
        except CheckpointError as error:
            raise self._with_alternative(error) from error

    def read(self, name: str, kind: str = "weight") -> Tensor | None:
        """Return the full tensor on the CPU in its stored dtype, or None where the checkpoint does not have it.

        Only this tensor is in memory. Raises DamagedCheckpointError where its bytes are not those that were written.
        """
        if self.shape(name, kind) is None:
            return None
        try:
            return self._assemble(name, kind)
        except CheckpointError as error:
            raise self._with_alternative(error) from error

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor files that this process has read so far."""
        return self._pieces.bytes_read

    def verify(self, on_progress: Callable[[int], None] = lambda size: None) -> None:
        """Read everything and compare every hash; also that each fp32 master rounds to its weight.

        on_progress: called with the bytes of each tensor that has been read.
        Raises DamagedCheckpointError with all that is damaged.
        """
        errors: list[CheckpointError] = []
        for name in self.manifest.files:
            errors.extend(_errors(partial(self._pieces.prove_header, name)))
        for kind, name in self._all():
            errors.extend(_errors(partial(self._compare, kind, name)))
            entry = self.manifest.tensors[kind][name]
            on_progress(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize)
        if errors:
            raise self._with_alternative(joined(errors))

    def _all(self) -> Iterator[tuple[str, str]]:
        for kind, entries in self.manifest.tensors.items():
            for name in entries:
                yield kind, name

    def _compare(self, kind: str, name: str) -> None:
        """Read one tensor; raise where it is damaged, or where it is a master and its weight is not it, rounded."""
        tensor = self._assemble(name, kind)
        if kind != "master" or self.shape(name) is None:
            return
        if torch.equal(tensor.to(self.dtype(name)), self._assemble(name, "weight")):
            return
        why = "Rounded to the weight's dtype it is not the stored weight."
        fix = "Load with no_load_optim: true to continue from the weights, or load another checkpoint."
        raise DamagedCheckpointError(Problem(f"master of {name}", why, fix, str(self.folder)))

    def _assemble(self, name: str, kind: str) -> Tensor:
        tensor = torch.empty(self.manifest.tensors[kind][name].shape, dtype=self.dtype(name, kind))
        self._pieces.fill([StateRequest(name, kind, 0, tensor.view(-1))])
        return tensor

    def _check_sizes(self) -> None:
        """Compare the size of every file with the manifest."""
        problems = []
        for name, entry in self.manifest.files.items():
            try:
                size = self.folder.size(name)
            except OSError as error:
                raise cannot_read(self.folder, name, error) from error
            if size is None:
                problems.append(damage(self.folder, name, "The file is missing."))
            elif size != entry.size:
                state = "truncated" if size < entry.size else "longer than it was written"
                problems.append(damage(self.folder, name, f"The file is {state}: {size} bytes of {entry.size}."))
        if problems:
            raise DamagedCheckpointError(*problems)

    def _with_alternative(self, error: CheckpointError) -> CheckpointError:
        """Return the error of a damaged checkpoint with the newest other of this run that looks whole."""
        if not isinstance(error, DamagedCheckpointError):
            return error
        root = self.folder.parent
        for iteration, folder in reversed(_others(root).items()):
            if folder.name != self.folder.name and _looks_whole(folder):
                fix = f"{folder} is complete. Load it with load: {root} and iteration: {iteration}."
                return type(error)(*(Problem(p.what, p.why, fix, p.where) for p in error.problems))
        return error


def _others(root: Storage) -> dict[int, Storage]:
    try:
        return readable_steps(root)
    except OSError:
        return {}


def _looks_whole(folder: Storage) -> bool:
    """Say whether manifest and file sizes of another checkpoint agree."""
    try:
        manifest = read_manifest(folder)
        return all(folder.size(name) == entry.size for name, entry in manifest.files.items())
    except (DeepyError, OSError):
        return False


def _errors(action: Callable[[], None]) -> Iterator[CheckpointError]:
    """Yield what an action finds wrong."""
    try:
        action()
    except CheckpointError as error:
        yield error
