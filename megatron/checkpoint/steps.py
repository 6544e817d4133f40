"""The checkpoints of a storage: which there are, which one `latest` names, and how one goes.

See `megatron.checkpoint.layout` for the names.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator

from megatron import logs
from megatron.checkpoint.layout import DELETED, LATEST, MANIFEST, MARK, REPLACED, WRITING, step_name
from megatron.checkpoint.storage import Storage

logger = logs.get_logger(__name__)

_STEP = re.compile(r"global_step(\d+)")
_RANK_FILE = re.compile(r"rank_\d{5}(\.[0-9a-f]{8})?\.safetensors")
_MARK_FORMAT = "deepy checkpoint under way"


def whole_steps(root: Storage) -> dict[int, Storage]:
    """Return iteration -> folder of every checkpoint that has a manifest, in ascending order."""
    return {step: folder for step, folder in _folders(root) if folder.size(MANIFEST) is not None}


def foreign_folders(root: Storage) -> list[str]:
    """Return the names of the step folders that are no checkpoints of ours, but another program's."""
    found = (folder for _, folder in _folders(root) if folder.size(MANIFEST) is None and not _is_marked(folder))
    return [folder.name for folder in found if not _was_ours(folder)]


def incomplete_folders(root: Storage) -> list[str]:
    """Return the names of the step folders that hold parts of a checkpoint of ours: no save leaves such a one."""
    found = (folder for _, folder in _folders(root) if folder.size(MANIFEST) is None and not _is_marked(folder))
    return [folder.name for folder in found if _was_ours(folder)]


def _was_ours(folder: Storage) -> bool:
    """Say whether a folder without a manifest can only be what is left, or has arrived, of a checkpoint of ours."""
    files = folder.files()
    return any(_RANK_FILE.fullmatch(name) for name in files) or not (files or folder.folders())


def readable_steps(root: Storage) -> dict[int, Storage]:
    """Return iteration -> folder of all that can be loaded, with those whose replacement was cut off half-way."""
    aside = {step: folder for step, folder in _folders(root, REPLACED) if folder.size(MANIFEST) is not None}
    return dict(sorted({**aside, **whole_steps(root)}.items()))


def _folders(root: Storage, prefix: str = "") -> Iterator[tuple[int, Storage]]:
    """Yield (iteration, folder) of the step folders whose names begin with a prefix, in ascending order."""
    names = (name for name in root.folders() if name.startswith(prefix))
    matches = ((_STEP.fullmatch(name.removeprefix(prefix)), name) for name in names)
    yield from sorted(((int(match[1]), root.at(name)) for match, name in matches if match), key=lambda pair: pair[0])


def latest_step(root: Storage) -> int | None:
    """Return the iteration that `latest` names, or None where there is no such file or it names none.

    Raises OSError where it cannot be read now: another checkpoint must not take the place of the one it names."""
    try:
        match = _STEP.fullmatch(root.read(LATEST).decode().strip())
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def set_latest(root: Storage, iteration: int) -> None:
    """Point `latest` at a checkpoint, atomically and durably."""
    root.write(LATEST, step_name(iteration).encode())


def mark(folder: Storage) -> None:
    """Write the object that says that a folder is ours and not whole, before anything else is written or deleted."""
    owner = {"format": _MARK_FORMAT, "process": os.getpid(), "host": platform.node(), "time": time.time()}
    folder.write(MARK, json.dumps(owner).encode())


def _is_marked(folder: Storage) -> bool:
    try:
        return bool(json.loads(folder.read(MARK)).get("format") == _MARK_FORMAT)
    except (FileNotFoundError, ValueError, AttributeError):
        return False


def delete_step(root: Storage, folder: Storage) -> None:
    """Delete a checkpoint so that, cut off at any moment, what is left is known as a leftover of ours."""
    if root.renames:
        root.rename(folder.name, f"{DELETED}{folder.name}")
        root.delete(f"{DELETED}{folder.name}")
        return
    mark(folder)
    folder.delete(MANIFEST)
    _empty(folder)


def _empty(folder: Storage) -> None:
    """Delete all objects of a folder, its mark last."""
    for name in [*folder.folders(), *folder.files()]:
        if name != MARK:
            folder.delete(name)
    folder.delete(MARK)


def clean_leftovers(root: Storage) -> None:
    """Remove what killed saves left behind; a checkpoint that had stepped aside and was not replaced comes back.

    What cannot be removed, since another process reads it for instance, stays until the next save.
    """
    if not root.renames:
        for _, folder in list(_folders(root)):
            if _is_marked(folder):
                _try(lambda: sweep(folder), folder)  # noqa: B023
        return
    for prefix in (WRITING, DELETED):
        for _, folder in list(_folders(root, prefix)):
            _try(folder.delete, folder)
    whole = whole_steps(root)
    for iteration, folder in list(_folders(root, REPLACED)):
        if iteration in whole:
            _try(folder.delete, folder)
        else:
            root.rename(folder.name, step_name(iteration))


def _try(clean: Callable[[], None], folder: Storage) -> None:
    try:
        clean()
    except OSError as error:
        logger.warning("what is left in %s could not be removed: %s", folder, error)


def sweep(folder: Storage) -> None:
    """Delete what a save or a removal that was cut off left in a folder; a checkpoint that is whole stays."""
    if folder.size(MANIFEST) is None:
        _empty(folder)
        return
    try:
        needed = set(json.loads(folder.read(MANIFEST))["files"])
    except (ValueError, KeyError, TypeError):
        return  # it is damaged, and nobody knows what it needs
    for name in folder.files():
        if name.startswith("rank_") and name not in needed:
            folder.delete(name)
    folder.delete(MARK)
