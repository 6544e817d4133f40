"""The watch over the other ranks, where no launcher of ours starts them: torchrun, srun, mpirun, plain variables.

    watch = PeerWatch(place, hang_seconds)      # before a GPU is used: it forks the guardian
    watch.connect(store)                        # once the ranks have met
    watch.announce(failure)                     # or watch.finish()

The work is done by `megatron.launch.guardian`; in the rank itself only a thread waits for its word, which costs nothing
and touches no lock of torch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from mmap import mmap

import torch.distributed as dist

from megatron import signals, whereabouts
from megatron.launch import scratch, stacks
from megatron.launch.failure import Failure
from megatron.launch.guardian import Ward, run_guardian
from megatron.launch.hub import Waits
from megatron.launch.link import Link, listen
from megatron.launch.place import Place
from megatron.whereabouts import RECORD_BYTES

_MEETING_PLACE = "deepy/watch"
_ANNOUNCE_SECONDS = 30.0
_PART_SECONDS = 5.0


class PeerWatch:
    """Ends this process when another rank fails or the run hangs, and tells the others when this one does.

    hang_seconds: after which a run whose ranks do not move is ended; None: never."""

    def __init__(self, place: Place, hang_seconds: float | None = None, waits: Waits | None = None) -> None:
        self.place = place
        self.folder = scratch.make()  # the guardian removes it
        self._secret = secrets.token_hex(16)
        self._port = 0
        self._is_parting = self._is_alone = False
        self._is_announcing = False
        self._may_end = threading.Event()
        self._guardian = self._fork(hang_seconds, waits or Waits())
        self._thread = threading.Thread(target=self._hear, name="peer-watch", daemon=True)
        self._thread.start()

    def _fork(self, hang_seconds: float | None, waits: Waits) -> int:
        positions, rank = mmap(-1, RECORD_BYTES), os.getpid()
        answers = os.memfd_create("deepy-stacks")
        listening = listen() if self.place.rank == 0 else None
        self._port = 0 if listening is None else listening.getsockname()[1]
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            ward = Ward(rank, positions, answers, Link(theirs), self.folder)
            run_guardian(self.place, ward, listening, self._secret, hang_seconds, waits)
        theirs.close()
        if listening is not None:
            listening.close()
        whereabouts.keep_in(positions)
        stacks.answer_in(answers)
        self._link = Link(mine)
        return pid

    def connect(self, store: dist.Store | None, address: str) -> None:
        """Let the guardian join those of the other ranks.

        store: in which rank 0 tells where; None for a single process. address: of rank 0's machine."""
        port, secret = self._port, self._secret
        if store is not None and self.place.rank == 0:
            store.set(_MEETING_PLACE, json.dumps([port, secret]))
        elif store is not None:
            port, secret = json.loads(store.get(_MEETING_PLACE))
        self._link.send({"connect": [address, port, secret]})

    def announce(self, failure: Failure) -> bool:
        """Tell the others that this rank failed, and wait until the first cause has been shown.

        Returns whether this process must print its failure itself, because nobody else can."""
        self._is_announcing = True
        self._link.send({"failure": dataclasses.asdict(failure)})
        if not self._link.is_open:
            return True
        return not self._may_end.wait(_ANNOUNCE_SECONDS) or self._is_alone

    def finish(self) -> None:
        """Part in good order; the others are not told that this rank is gone."""
        self._is_parting = True
        self._link.send({"bye": True})
        deadline = time.monotonic() + _PART_SECONDS
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self._guardian, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.005)
        self._thread.join(timeout=1)
        self._link.close()

    def _hear(self) -> None:
        while self._link.is_open:
            for message in self._link.messages(wait=True):
                if "leave" in message:
                    self._leave(int(message["leave"]))
                elif "alone" in message:
                    self._is_alone = True
                    self._may_end.set()
        if not self._is_parting:
            self._is_alone = not self._may_end.is_set()
            self._leave(1, "its watch (the process deepy-watch) was killed")

    def _leave(self, exit_code: int, reason: str = "") -> None:
        """End this process; one that has failed itself ends with its own exit code."""
        if self._is_announcing:
            self._may_end.set()
            return
        if reason:
            shutil.rmtree(self.folder, ignore_errors=True)
            line = f"rank {self.place.rank} on host {self.place.host} ends because {reason}.\n"
            os.write(2, line.encode())
        signals.leave(exit_code)
