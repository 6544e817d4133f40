"""Names on disk: which folders and files a checkpoint root holds, and what another program's folder looks like.

<save>/latest                          text: "global_step<N>", moved last
<save>/global_step<N>/manifest.json    what there is: tensors, pieces, hashes, config, progress
<save>/global_step<N>/rank_<R>.safetensors
<save>/global_step<N>/config.yml       the resolved config; configs/ holds the YAML files as given
<save>/global_step<N>/tokenizer/       the tokenizer's files
<save>/.writing_global_step<N>         a save that is under way, or that was cut off
<save>/.replaced_global_step<N>        the earlier checkpoint of this iteration while its successor takes its place
<save>/.deleted_global_step<N>         a checkpoint that retention is removing
<save>/.lock                           held by the run that saves here

An object store has no rename: there a save writes to global_step<N>/ at once, first of all the object `.writing`, which
says whose it is, and manifest.json last. What has no manifest is no checkpoint; a `.writing` beside none is a leftover.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
LOCK = ".lock"
MARK = ".writing"
WRITING, REPLACED, DELETED = ".writing_", ".replaced_", ".deleted_"
_NEOX = (
    "This looks like a checkpoint of GPT-NeoX or DeepSpeed, whose pickled .pt files are not opened here. Convert it "
    "with GPT-NeoX's tools/ckpts/convert_neox_to_hf.py, then import the result: "
    "python tools/ckpts/convert.py import <converted> <new folder>"
)
_STEP = re.compile(r"global_step(\d+)")


def step_name(iteration: int) -> str:
    """Return the folder name of the checkpoint after `iteration` optimizer steps."""
    return f"global_step{iteration}"


def rank_file(rank: int) -> str:
    """Return the name of the file that a global rank writes."""
    return f"rank_{rank:05d}.safetensors"


def list_steps(root: Path, prefix: str = "") -> dict[int, Path]:
    """Return iteration -> folder of every checkpoint that has a manifest, in ascending order.

    prefix: WRITING, REPLACED or DELETED lists those folders instead, with or without a manifest.
    """
    found: dict[int, Path] = {}
    if root.is_dir():
        for entry in root.iterdir():
            match = _STEP.fullmatch(entry.name.removeprefix(prefix)) if entry.name.startswith(prefix) else None
            if match and entry.is_dir() and (prefix or (entry / MANIFEST).is_file()):
                found[int(match[1])] = entry
    return dict(sorted(found.items()))


def loadable_steps(root: Path) -> dict[int, Path]:
    """Return iteration -> folder of all that can be loaded, with those whose replacement was cut off half-way."""
    whole = list_steps(root)
    aside = {step: path for step, path in list_steps(root, REPLACED).items() if (path / MANIFEST).is_file()}
    return dict(sorted({**aside, **whole}.items()))


def foreign_steps(root: Path) -> list[str]:
    """Return the names of the step folders that are no checkpoints of ours: another program's, or incomplete copies."""
    entries = root.iterdir() if root.is_dir() else ()
    found = (e.name for e in entries if _STEP.fullmatch(e.name) and e.is_dir() and not (e / MANIFEST).is_file())
    return sorted(found)


def read_latest(root: Path) -> int | None:
    """Return the iteration that `latest` names, or None where there is no such file or it names none."""
    try:
        match = _STEP.fullmatch((root / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def write_latest(root: Path, iteration: int) -> None:
    """Point `latest` at a checkpoint, atomically and durably."""
    temporary = root / f".{LATEST}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(step_name(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / LATEST)
    sync_folder(root)


def sync_folder(folder: Path) -> None:
    """Make the names within a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def foreign_kind(folder: Path) -> str | None:
    """Say what another program's checkpoint folder looks like and how to use it; None where it is not recognised."""
    if not folder.is_dir():
        return None
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        return (
            f"This looks like a Hugging Face model. Import it with: "
            f"python tools/ckpts/convert.py import {folder} <new folder>"
        )
    if any(re.fullmatch(r"(layer_\d+-model|mp_rank)_\d+.*_model_states\.pt", name) for name in names):
        return _NEOX
    for name in sorted(names):
        inner = folder / name
        if _STEP.fullmatch(name) and inner.is_dir() and any(inner.glob("*_model_states.pt")):
            return f"Within it, {name}: {_NEOX}"
    return None
