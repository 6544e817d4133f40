"""Killed twenty times at random moments, saves included, a run is in the end the run that nothing happened to."""

from __future__ import annotations

import itertools
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import lock
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.errors import CheckpointError
from tests.checkpoint.s3_server import S3Server
from tests.end_to_end.test_resume import run
from tests.end_to_end.tiny import losses, stored, write_corpus
from tests.ranks import RankError, preload, run_ranks

OFTEN = {
    "checkpoint_factor": 1,
    "keep_last_n_checkpoints": 2,
    "train_iters": 6,
    "eval_interval": 3,
    "eval_iters": 1,
}


def run_with_a_bomb(folder: Path, world_size: int, bomb: tuple[int, float], changes: dict[str, Any]) -> dict[str, int]:
    """Run, and end a rank as kill -9 does: at once, with no handler. bomb: rank, seconds."""
    victim, seconds = bomb
    if torch.distributed.get_rank() == victim:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    return run(folder, world_size, **changes)


def newest(save: str) -> int:
    """Return the iteration of the newest checkpoint, of which every byte is as it was written; -1 without one."""
    try:
        reader = CheckpointReader(find_checkpoint(save))
    except CheckpointError as error:
        if re.search("holds no checkpoint|no such folder", str(error)) is None:
            raise
        return -1
    reader.verify()
    return reader.manifest.iteration


TWO_RANKS = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 1, "async_save": True}


@pytest.mark.parametrize(
    ("kills", "world_size", "changes", "remote"),
    [
        (7, 1, {}, False),
        (5, 1, {"async_save": True}, False),
        (4, 2, TWO_RANKS, False),
        (4, 1, {"async_save": True}, True),
    ],
    ids=["saved at once", "in the background", "by two ranks", "to an object store"],
)
def test_no_kill_costs_more_than_what_was_not_yet_saved(
    tmp_path: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    world_size: int,
    changes: dict[str, Any],
    remote: bool,
) -> None:
    monkeypatch.setattr(lock, "_SETTLE", 0.05)
    preload()
    whole = tmp_path / "whole"
    write_corpus(whole / "corpus")
    started = time.perf_counter()
    keys = {**OFTEN, **changes, "save": s3.bucket() if remote else str(whole / "checkpoints")}
    run_ranks(world_size, lambda: run(whole, world_size, **keys))
    seconds = time.perf_counter() - started
    dice, number = random.Random(kills), 0
    while kills > 0:
        number += 1
        broken = tmp_path / f"broken{number}"
        write_corpus(broken / "corpus")
        save = s3.bucket() if remote else str(broken / "checkpoints")
        kills -= kill_until_done(broken, world_size, {**keys, "save": save}, dice, seconds)
        for event in ("step", "validation"):
            assert losses(whole, event) == losses(broken, event)
        expected, found = stored(keys["save"]), stored(save)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def kill_until_done(folder: Path, world_size: int, changes: dict[str, Any], dice: random.Random, seconds: float) -> int:
    """Run in `folder` as often as it takes, each time with a bomb; return how many went off."""
    had = -1
    for kills in itertools.count():
        bomb = dice.randrange(world_size), dice.uniform(0.2, 0.9) * seconds
        try:
            run_ranks(world_size, run_with_a_bomb, folder, world_size, bomb, changes)
        except (RankError, RuntimeError):  # the other rank lost its peer
            has = newest(changes["save"])
            assert has >= had
            had = has
        else:
            return kills
    raise AssertionError
