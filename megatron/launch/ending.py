"""How a run that is asked to stop ends: what is said, once, and with which exit code, under every launcher.

Before the first step a signal ends a rank at once, in a thread, since the rank may be waiting for others for minutes:
it tells them, so that none of them waits for it. Later the loop stops (`megatron/training/stop.py`), and says why.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial

from megatron import signals
from megatron.config.schema.config import Config
from megatron.launch.board import Board
from megatron.launch.failure import Failure
from megatron.launch.place import Place
from megatron.launch.requeue import requeue
from megatron.launch.watch import PeerWatch
from megatron.launch.worker import report
from megatron.training.clocks import Clocks
from megatron.training.stop import Stopped, unbegun


def end_at_once(config: Config, place: Place, board: Board | None, watch: PeerWatch | None) -> None:
    """Let a signal end this process from now on, until the loop begins; the other ranks end with it."""

    def end_as(stopped: Stopped) -> None:
        failure = _report_of(stopped, config, place)
        if report(failure, board, watch):
            print(f"\n{failure}", file=sys.stderr, flush=True)
        signals.leave(failure.exit_code)

    def end(number: int) -> None:
        text = f"stopped by {signal.Signals(number).name} {signals.NOTHING_LOST}"
        end_as(Stopped(config.stopping.requeue_exit_code, text))

    inbox = signals.open_inbox()
    inbox.on_first(end)
    clocks = Clocks(config, os.environ)
    if place.rank == 0 and clocks.wall_seconds is not None:
        over = partial(inbox.expire, partial(end_as, unbegun(config)))
        timer = threading.Timer(max(0.0, clocks.wall_seconds), over)
        timer.daemon = True
        timer.start()


def tell_stopped(stopped: Stopped, config: Config, place: Place, board: Board | None) -> int:
    """Say why a run stopped, and how it goes on, before its ranks part; return the exit code."""
    failure = _report_of(stopped, config, place)
    if board is not None:
        board.post(place.local_rank, failure)
    elif place.rank == 0:
        print(f"\n{failure}", file=sys.stderr, flush=True)
    return failure.exit_code


def _report_of(stopped: Stopped, config: Config, place: Place) -> Failure:
    """Return the report of a rank that stopped; rank 0 asks Slurm for another turn where the config says so."""
    text, settings = stopped.text, config.stopping
    if place.rank == 0 and settings.slurm_requeue and stopped.exit_code == settings.requeue_exit_code:
        text = f"{text} {requeue(os.environ)}"
    about = place.rank, place.world_size, place.host, None
    return Failure(*about, stopped.exit_code, f"{text} Exit code {stopped.exit_code}.", True, when=time.time())
