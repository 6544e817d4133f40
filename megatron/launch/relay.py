"""Run the command that starts a run on several hosts, and pass on to it who asks the run to end.

A stop must reach the ranks, which save a checkpoint and end with exit code 75. pdsh passes no signal on, so that a
second pdsh signals each host's part of the run. MPI's launchers and srun end the ranks at once on SIGTERM, but hand
SIGUSR1 over, which asks for the same thing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from megatron.launch.hosts import Host
from megatron.launch.remote import pdsh_signal_command

ASKS_TO_END = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Relay:
    """The launcher's process, and how it is told. launcher, hosts, run: as `remote_command` was given them."""

    process: subprocess.Popen[bytes]
    launcher: str
    hosts: Sequence[Host]
    run: str
    interrupts: int = 0

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to save and end; a person's Ctrl-C ends it without, and a second one at once."""
        if number == signal.SIGINT:
            self.interrupts += 1
            self._tell("INT" if self.interrupts == 1 else "KILL", signal.SIGINT)
        else:
            self._tell("TERM", signal.SIGUSR1)

    def _tell(self, name: str, number: int) -> None:
        if self.launcher != "pdsh":
            if number != signal.SIGINT or not _shares_terminal():  # else the terminal has told it already
                self.process.send_signal(number)
            return
        subprocess.Popen(
            pdsh_signal_command(self.hosts, self.run, name), stdin=subprocess.DEVNULL, start_new_session=True
        )


def _shares_terminal() -> bool:
    return sys.stdin.isatty() and os.getpgrp() == os.tcgetpgrp(sys.stdin.fileno())


def run_remote(command: list[str], launcher: str, hosts: Sequence[Host], run: str) -> int:
    """Run the command until it ends; return its exit code, 128 + n for signal n."""
    is_pdsh = launcher == "pdsh"  # in a session of its own the terminal's Ctrl-C does not reach it, only us
    process = subprocess.Popen(command, start_new_session=is_pdsh, stdin=subprocess.DEVNULL if is_pdsh else None)
    relay = Relay(process, launcher, hosts, run)
    taken = {signal.SIGINT, *ASKS_TO_END}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: the terminal's end is not the run's
        taken.remove(signal.SIGHUP)
    old = {number: signal.signal(number, relay.pass_on) for number in taken}
    try:
        status = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
