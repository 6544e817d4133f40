"""What another process of this machine is doing, asked without its help: its state, and its Python stack.

A rank prepares once, with `answer_in`; whoever holds the same file may then `ask`. The answer is written by a signal
handler in C (faulthandler), so it comes from a rank that sleeps, that waits in a collective, or that is inside of
native code and never gives Python a turn. The signal, SIGURG, does nothing to a process that has not prepared.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_SIGNAL = signal.SIGURG
_SECONDS = 2.0  # for the answer; a process that is scheduled at all answers in milliseconds
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line \d+ in (?P<function>.+)$')
_MOST_FRAMES = 24
_STATES = {
    "T": "stopped (by SIGSTOP, Ctrl-Z or a debugger)",
    "t": "stopped by a debugger",
    "D": "held by the kernel, most often for a disk or a network file system that does not answer",
    "Z": "gone",
    "X": "gone",
    "": "gone",
}


@dataclass(frozen=True)
class Doing:
    """What a process does. trouble: why it can do nothing, or "". waits_in: the collective of torch.distributed that it
    waits in, or "". stack: its main thread's Python frames, the innermost first; "" where there was no answer.
    record: the file in which NCCL's last collectives are, or ""."""

    trouble: str = ""
    waits_in: str = ""
    stack: str = ""
    record: str = ""

    @property
    def is_stopped(self) -> bool:
        """Whether it cannot run at all."""
        return bool(self.trouble)


def answer_in(descriptor: int) -> None:
    """Let this process write its stack to a file whenever it is asked; the file must stay open."""
    faulthandler.register(_SIGNAL, file=descriptor, all_threads=True, chain=False)


def state_of(pid: int) -> str:
    """Return the letter of a process's state as in proc(5), "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def glance(pid: int) -> Doing:
    """Return what can be known of a process without disturbing it: a signal interrupts some of the calls that native
    code makes."""
    return Doing(_STATES.get(state_of(pid), ""))


def ask(pid: int, descriptor: int, seconds: float = _SECONDS) -> Doing:
    """Return what the process `pid` does. descriptor: of the file that it answers in, open for reading."""
    trouble = glance(pid).trouble
    if trouble in ("gone", _STATES["T"], _STATES["t"]):
        return Doing(trouble)
    text = _answer(pid, descriptor, seconds)
    if not text and not trouble:
        trouble = "silent: it did not even answer a signal"
    return Doing(trouble, waits_in(text), main_thread(text))


def _answer(pid: int, descriptor: int, seconds: float) -> str:
    begin = seen = os.fstat(descriptor).st_size
    try:
        os.kill(pid, _SIGNAL)
    except ProcessLookupError:
        return ""
    deadline, quiet = time.monotonic() + seconds, 0
    while time.monotonic() < deadline and quiet < 3:
        time.sleep(0.02)
        size = os.fstat(descriptor).st_size
        quiet = quiet + 1 if size == seen and size > begin else 0
        seen = size
    return os.pread(descriptor, seen - begin, begin).decode(errors="replace")


def _threads(text: str) -> list[str]:
    """Return the frames of each thread; that which took the signal, the main one, comes first."""
    blocks = re.split(r"^(?=(?:Current thread|Thread) 0x)", text, flags=re.MULTILINE)
    blocks = [block for block in blocks if "most recent call first" in block]
    return sorted(blocks, key=lambda block: not block.startswith("Current"))


def main_thread(text: str) -> str:
    """Return the main thread's frames of faulthandler's `text`, without those above the script."""
    blocks = _threads(text)
    if not blocks:
        return ""
    frames = [line for line in blocks[0].splitlines()[1:] if line.strip()]
    kept = [line for line in frames if not _is_above(line)][:_MOST_FRAMES]
    return "\n".join(kept or frames)


def _is_above(line: str) -> bool:
    found = _FRAME.match(line)
    return found is not None and (
        "<frozen runpy>" in found["file"] or Path(found["file"]).parent == Path(__file__).parent
    )


def waits_in(text: str) -> str:
    """Return the name of the collective that a thread waits in, such as `all_reduce`, or ""."""
    for block in _threads(text):
        found = ""
        for line in block.splitlines():
            frame = _FRAME.match(line)
            if frame is None:
                continue
            if "/torch/distributed/" in frame["file"]:
                found = found if frame["function"] == "wrapper" else frame["function"]
            elif "/torch/cuda/" in frame["file"] and "synchronize" in frame["function"]:
                return "synchronize (for its GPU)"
            elif found:
                return found
        if found:
            return found
    return ""
