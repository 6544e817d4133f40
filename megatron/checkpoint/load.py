"""Loading: find the checkpoint or stop with a list of what is there; read tensors one by one, each proved by its hash.

reader = CheckpointReader(find_checkpoint(Path("checkpoints/pile")))
weight = reader.read("layers.0.mlp.linear1.weight", "weight")
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron import logs
from megatron.checkpoint import layout
from megatron.checkpoint.manifest import (
    Manifest,
    Piece,
    TensorEntry,
    pieces_of_shard,
    read_manifest,
    shards_of,
    share_shape,
)
from megatron.checkpoint.tensor_file import DTYPES, from_bytes, read_range
from megatron.errors import CheckpointError, DeepyError, Problem
from megatron.parallel.sharding import ShardSpec, merge

logger = logs.get_logger(__name__)


def find_checkpoint(root: Path | str, iteration: int | None = None) -> Path:
    """Return the folder of the checkpoint that `latest` names, or of the given iteration.

    root: the `save` folder of a run, or one `global_step<N>` folder itself.
    Raises CheckpointError that lists what is there instead. It never returns without a checkpoint.
    """
    root = Path(root)
    if (root / layout.MANIFEST).is_file():
        return _exactly(root, iteration)
    steps = layout.loadable_steps(root)
    if not steps:
        raise _nothing_there(root)
    wanted = iteration if iteration is not None else layout.read_latest(root)
    if wanted is None:
        wanted = max(steps)
        state = "names no checkpoint in its file" if (root / layout.LATEST).exists() else "has no file"
        logger.info("%s %s `latest`: taking its newest, %s", root, state, layout.step_name(wanted))
    if wanted not in steps:
        source = "iteration" if iteration is not None else f"{root / layout.LATEST}"
        raise CheckpointError(
            Problem(
                what=f"{source} = {wanted}",
                why=f"{root} holds no checkpoint of this iteration. There are: {', '.join(map(str, steps))}.",
                fix=f"Choose one of them, for example --iteration {max(steps)}.",
            )
        )
    return steps[wanted]


def _exactly(folder: Path, iteration: int | None) -> Path:
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


def _nothing_there(root: Path) -> CheckpointError:
    """Return the error for a folder without checkpoints, saying what it is or what is nearby."""
    foreign = layout.foreign_kind(root)
    if foreign:
        return CheckpointError(Problem(f"load = {root}", "It is not a checkpoint of this library.", foreign))
    place = root
    while not place.is_dir() and place != place.parent:
        place = place.parent
    missing = "It holds no checkpoint" if root.is_dir() else "There is no such folder"
    entries = [entry for entry in sorted(place.iterdir()) if entry.name != layout.LOCK]
    names = [entry.name + ("/" if entry.is_dir() else "") for entry in entries]
    inside = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    near = [str(entry) for entry in entries if entry.is_dir() and layout.loadable_steps(entry)]
    fix = f"Set load to {' or '.join(near[:3])}." if near else "Set load to a folder that holds global_step<N> folders."
    return CheckpointError(Problem(f"load = {root}", f"{missing}. {place} holds: {inside or 'nothing'}.", fix))


class CheckpointReader:
    """One checkpoint folder. Opening it reads the manifest and compares the sizes of all files, nothing else."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._proved: set[str] = set()
        try:
            self.manifest: Manifest = read_manifest(self.folder)
            self._check_sizes()
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

    def read(self, name: str, kind: str = "weight") -> Tensor | None:
        """Return the full tensor on the CPU in its stored dtype, or None where the checkpoint does not have it.

        Only this tensor is in memory. Raises CheckpointError where its bytes are not those that were written.
        """
        entry = self.manifest.tensors.get(kind, {}).get(name)
        if entry is None:
            return None
        try:
            return self._assemble(entry)
        except CheckpointError as error:
            raise self._with_alternative(error) from error

    def verify(self) -> None:
        """Read everything and compare every hash; also that each fp32 master rounds to its weight.

        Raises CheckpointError with all damaged tensors.
        """
        problems: list[Problem] = []
        for kind, name in self._all():
            try:
                tensor = self._assemble(self.manifest.tensors[kind][name])
            except CheckpointError as error:
                problems.extend(error.problems)
                continue
            if kind == "master":
                problems.extend(self._compare_master(name, tensor))
        if problems:
            raise self._with_alternative(CheckpointError(*dict.fromkeys(problems)))

    def _all(self) -> Iterator[tuple[str, str]]:
        for kind, entries in self.manifest.tensors.items():
            for name in entries:
                yield kind, name

    def _compare_master(self, name: str, master: Tensor) -> Iterator[Problem]:
        """Yield a problem where the weight is not its master, rounded."""
        entry = self.manifest.tensors.get("weight", {}).get(name)
        if entry is None or torch.equal(master.to(DTYPES[entry.dtype]), self._assemble(entry)):
            return
        yield Problem(
            where=str(self.folder),
            what=f"master of {name}",
            why="Rounded to the weight's dtype it is not the stored weight.",
            fix="Load with no_load_optim: true to continue from the weights, or load another checkpoint.",
        )

    def _assemble(self, entry: TensorEntry) -> Tensor:
        """Return the full tensor of its pieces."""
        size = shards_of(entry)
        shares = [self._share(entry, rank, share_shape(entry, size)) for rank in range(size)]
        return merge(shares, ShardSpec(dim=entry.dim, blocks=entry.blocks)).reshape(entry.shape)

    def _share(self, entry: TensorEntry, rank: int, shape: tuple[int, ...]) -> Tensor:
        pieces = pieces_of_shard(entry, rank)
        if len(pieces) == 1:
            return self._piece(pieces[0], entry).reshape(shape)
        share = torch.empty(shape, dtype=DTYPES[entry.dtype]).reshape(-1)
        for piece in pieces:
            share[piece.start : piece.start + piece.length] = self._piece(piece, entry)
        return share.reshape(shape)

    def _piece(self, piece: Piece, entry: TensorEntry) -> Tensor:
        """Read one piece and prove it by its hash."""
        path = self.folder / piece.file
        self._prove_header(path)
        dtype = DTYPES[entry.dtype]
        values = self._bytes(path, piece.offset, piece.length * dtype.itemsize)
        if (
            len(values) < piece.length * dtype.itemsize
            or self.manifest.hashing.wrong_block(values, piece.hashes) is not None
        ):
            raise CheckpointError(_damaged(path, f"The values of {piece.key} do not match their hash."))
        return from_bytes(values, dtype)

    def _prove_header(self, path: Path) -> None:
        """Compare the header of a file with its hash, once for each file."""
        if path.name in self._proved:
            return
        entry = self.manifest.files[path.name]
        if self.manifest.hashing.hash(self._bytes(path, 0, entry.header_size)) != entry.header_hash:
            raise CheckpointError(_damaged(path, "Its header does not match its hash."))
        self._proved.add(path.name)

    def _bytes(self, path: Path, offset: int, size: int) -> bytearray:
        try:
            return read_range(path, offset, size)
        except OSError as error:
            raise CheckpointError(_damaged(path, f"It cannot be read ({error.strerror}).")) from error

    def _check_sizes(self) -> None:
        """Compare the size of every file with the manifest."""
        problems = []
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problems.append(_damaged(path, "The file is missing."))
            elif size != entry.size:
                state = "truncated" if size < entry.size else "longer than it was written"
                problems.append(_damaged(path, f"The file is {state}: {size} bytes of {entry.size}."))
        if problems:
            raise CheckpointError(*problems)

    def _with_alternative(self, error: CheckpointError) -> CheckpointError:
        """Return the error with the newest other checkpoint of this run that looks whole, and how to load it."""
        for iteration, folder in reversed(layout.loadable_steps(self.folder.parent).items()):
            if folder.name != self.folder.name and _looks_whole(folder):
                fix = f"{folder} is complete. Load it with load: {self.folder.parent} and --iteration {iteration}."
                return CheckpointError(*(Problem(p.what, p.why, fix, p.where) for p in error.problems))
        return error


def _looks_whole(folder: Path) -> bool:
    """Say whether manifest and file sizes of another checkpoint agree."""
    try:
        manifest = read_manifest(folder)
        return all((folder / name).stat().st_size == entry.size for name, entry in manifest.files.items())
    except (DeepyError, OSError):
        return False


def _damaged(path: Path, why: str) -> Problem:
    fix = "No other complete checkpoint lies beside it: restore the file from a copy."
    return Problem(where=str(path), what="damaged checkpoint", why=why, fix=fix)
