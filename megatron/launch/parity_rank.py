"""One rank of `./deepy.py parity`. Importing this module loads torch and DeepSpeed."""

from __future__ import annotations

import os

from megatron.launch.lean import defer_compiler
from megatron.launch.place import find_place
from megatron.launch.worker import find_board, start_worker
from megatron.proof.run import prove
from megatron.proof.shrink import Trial

defer_compiler()


def run_rank(trial: Trial, verdict: int) -> int:
    """Take part in the trial as the rank that the environment describes; return the exit code of this process.

    verdict: a file descriptor, to which rank 0 writes b"1" where the trial passes and b"0" where it does not.
    """
    place = find_place(os.environ)
    worker = start_worker(trial.config, place, find_board(os.environ))
    passed = prove(trial, worker.mesh)
    if place.rank == 0:
        os.write(verdict, b"1" if passed else b"0")
    worker.finish()
    return 0
