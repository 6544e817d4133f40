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
