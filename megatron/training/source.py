"""Which checkpoint a run begins from, and which one stands in for it where it is damaged.

Only `resume: auto` without a named iteration takes an earlier checkpoint, the newest that is whole, and says so. What a
user names is loaded or the run stops.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.steps import foreign_folders, incomplete_folders, latest_step, readable_steps, whole_steps
from megatron.checkpoint.storage import Storage, storage_of
from megatron.checkpoint.together import together
from megatron.config.schema.run import CheckpointConfig
from megatron.errors import CheckpointError, DamagedCheckpointError, Problem
from megatron.logs import get_logger
from megatron.parallel.mesh import Mesh

logger = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run begins from.

    is_own: it lies in the run's own `save`, and the run goes on from it.
    earlier: checkpoints that may stand in for it, the newest first.
    """

    folder: Storage
    is_own: bool
    earlier: tuple[Storage, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Opened:
    """A source with its manifest read and the sizes of its files compared."""

    source: Source
    reader: CheckpointReader


def open_source(config: CheckpointConfig, mesh: Mesh) -> Opened | None:
    """Find and open the checkpoint that a run begins from, or return None where it begins from fresh weights.

    Every rank must call it; all get the same one. Raises CheckpointError on all of them as `find_source` does, where
    ranks see different files, and where what was found is damaged and nothing may stand in for it.
    """
    sources = together(mesh, lambda: find_source(config), _unreadable)
    if len({source and str(source.folder) for source in sources}) > 1:
        seen = ", ".join(sorted({str(source and source.folder) for source in sources}))
        why = f"The ranks see different newest checkpoints: {seen}."
        raise CheckpointError(Problem("resume", why, "Set save and load to a file system that all machines share."))
    source = sources[mesh.world.rank]
    return None if source is None else open_or_earlier(source, mesh)


def open_or_earlier(source: Source, mesh: Mesh) -> Opened:
    """Open a source, or the next that stands in for it; every rank must call it."""
    while True:
        readers: list[CheckpointReader] = []
        try:
            together(mesh, lambda: readers.append(CheckpointReader(source.folder)), _unreadable)  # noqa: B023
            return Opened(source, readers[0])
        except DamagedCheckpointError as error:
            source = stand_in(source, error)


def stand_in(source: Source, error: DamagedCheckpointError) -> Source:
    """Return the next earlier checkpoint, and say so; raise `error` where there is none."""
    if not source.earlier:
        raise error
    found = replace(source, folder=source.earlier[0], earlier=source.earlier[1:])
    logger.warning(
        "THE NEWEST CHECKPOINT IS DAMAGED: %s\nresume: auto takes an earlier one instead: %s. What was trained after "
        "it is trained again.",
        "\n".join(f"{problem.where}: {problem.why}" for problem in error.problems),
        found.folder,
    )
    return found


def find_source(config: CheckpointConfig) -> Source | None:
    """Return where a run begins from, or None where it begins from fresh weights.

    `resume: auto` prefers the newest checkpoint under `save`; `load` must exist or the run stops.
    Raises CheckpointError where `load` finds nothing, or where the run would write over another run's checkpoints.
    """
    save = storage_of(config.save) if config.save else None
    saved = readable_steps(save) if save else {}
    if save and (foreign := foreign_folders(save)):
        raise _foreign(config, foreign)
    if save and (incomplete := incomplete_folders(save)):
        _tell_incomplete(save, incomplete, saved)
    if config.resume == "auto" and save and saved:
        return _newest(config, save, saved)
    if config.load is not None and save and not saved and _is_same(storage_of(config.load), save):
        why = "it is the folder that this run saves to, and it holds no checkpoint yet."
        fix = "Write resume: auto instead of load: a run then begins anew where there is none, and else goes on."
        raise CheckpointError(Problem(f"load = {config.load}", why, fix))
    folder = find_checkpoint(config.load, config.iteration) if config.load is not None else None
    is_own = folder is not None and save is not None and _is_same(folder.parent, save)
    if saved and (not is_own or config.finetune):
        raise _occupied(config, max(saved), is_own)
    if config.iteration is not None and folder is None:
        why = f"{save or 'The run'} holds no checkpoint, and load names none."
        raise CheckpointError(Problem(f"iteration = {config.iteration}", why, "Set load, or leave iteration out."))
    if config.s3_path and not is_own:
        _require_free(config, storage_of(config.s3_path), folder)
    return Source(folder, is_own) if folder else None


def _tell_incomplete(save: Storage, names: list[str], saved: dict[int, Storage]) -> None:
    """Say which checkpoints lack their manifest; raise where there is no whole one, and a run would begin anew."""
    listed = ", ".join(names[:3])
    if not saved:
        why = f"of the checkpoints {listed} there is no manifest.json: they are incomplete, and there is no other."
        fix = "Restore it from a copy, or move them away, or set save to another folder."
        raise CheckpointError(Problem(f"save = {save}", why, fix))
    logger.warning("INCOMPLETE CHECKPOINTS in %s: %s without a manifest.json; they are passed over", save, listed)


def _require_free(config: CheckpointConfig, copy: Storage, folder: Storage | None) -> None:
    """Raise where `s3_path` holds copies of another run, unless this one goes on from them."""
    held = whole_steps(copy)
    goes_on = folder is not None and not config.finetune and _is_same(folder.parent, copy)
    if held and not goes_on:
        why = f"it already holds checkpoints, up to iteration {max(held)}, and this run would write over them."
        fix = f"Set s3_path to a folder of this run's own, or load: {copy} to continue from there."
        raise CheckpointError(Problem(f"s3_path = {config.s3_path}", why, fix))


def _is_same(one: Storage, other: Storage) -> bool:
    """Say whether two names are of the same folder."""
    paths = one.local_path(), other.local_path()
    return one == other if paths[0] is None or paths[1] is None else paths[0].resolve() == paths[1].resolve()


def _newest(config: CheckpointConfig, save: Storage, saved: dict[int, Storage]) -> Source:
    """Return the newest checkpoint of the run's own folder, which is the one that `latest` names, or the given one."""
    if config.iteration is not None:
        if config.iteration < max(saved):
            logger.warning(
                "iteration: %d takes the run back, though %s holds iteration %d; so does every later start with this "
                "key: leave it out once a checkpoint has been saved",
                *(config.iteration, save, max(saved)),
            )
        return Source(find_checkpoint(save, config.iteration), is_own=True)
    latest = latest_step(save)
    newest = latest if latest in saved else max((step for step in saved if step < (latest or 0)), default=max(saved))
    if latest is not None and latest not in saved:
        logger.warning(
            "THE NEWEST CHECKPOINT IS GONE: %s/latest names iteration %d, which is not there. resume: auto takes "
            "iteration %d instead.",
            *(save, latest, newest),
        )
    if newest < max(saved):
        logger.warning(
            "%s also holds iteration %d, after the one that its file `latest` names: of a run that was taken back, or "
            "saved in the moment of a kill. resume: auto takes iteration %d; iteration: %d takes that one.",
            *(save, max(saved), newest, max(saved)),
        )
    earlier = tuple(folder for step, folder in reversed(saved.items()) if step < newest)
    return Source(saved[newest], is_own=True, earlier=earlier)


def _occupied(config: CheckpointConfig, newest: int, is_own: bool) -> CheckpointError:
    """Return the error of a run that begins at step 0, or from elsewhere, in a folder that holds checkpoints."""
    why = f"it already holds checkpoints, up to iteration {newest}, and this run would write over them"
    if is_own:
        return CheckpointError(
            Problem(f"save = {config.save}", f"{why}: finetune begins at step 0.", "Set save to another folder.")
        )
    to_load = f", load: {config.save} to continue a certain one" if config.load is None else ""
    fix = f"Set resume: auto to continue the newest{to_load}, or set save to another folder."
    return CheckpointError(Problem(f"save = {config.save}", f"{why}.", fix))


def _foreign(config: CheckpointConfig, names: list[str]) -> CheckpointError:
    """Return the error of a run whose checkpoints would replace folders that are not this library's."""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    why = f"it holds {listed} without a manifest.json (of GPT-NeoX, or another program), which saves would replace."
    return CheckpointError(Problem(f"save = {config.save}", why, "Move them away, or set save to another folder."))


def _unreadable(error: OSError) -> Problem:
    """Return the problem behind an error of the file system."""
    why = f"{error.strerror or error} ({error.filename or 'no file named'})."
    return Problem("the checkpoint to begin from", why, "Give this user the right to read it, on every machine.")
