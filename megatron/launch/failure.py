"""What is said about a rank that failed: once, last, with rank, host and step.

A mistake of the user (DeepyError) is said in its own words; everything else keeps its traceback. An error that
only echoes the end of another rank, such as a closed connection, is never preferred to that rank's own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megatron import signals
from megatron.errors import DeepyError
from megatron.planning.machine import total_memory
from megatron.whereabouts import Position

GIBIBYTE = 2**30
_BRIEF = 120  # characters
# Words by which gloo, NCCL and TCPStore tell that a peer is gone.
_ECHOES = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "remote process exited",
    "timed out waiting",
    "socket timeout",
    "connection refused",
    "wait timeout after",
    "failed to recv, got 0 bytes",
    "another rank failed",
)
# What the traceback of an error between ranks names; other connections, to a web server say, name none of it.
_BETWEEN_RANKS = ("torch/distributed/", "gloo/", "nccl")


@dataclass(frozen=True)
class Failure:
    """The end of one rank.

    step: the iteration under way, None before the first. when: seconds since the epoch.
    text: what a person reads: the traceback, or the message of a DeepyError.
    doing: where in the step it was, such as `micro-batch 3, in backward`; "" where that is not known.
    is_mistake: True for a DeepyError, whose text stands by itself.
    is_echo: True where the error only tells that another rank is gone.
    is_lost: True where nothing is left of the rank; `step` and `doing` are the last that was heard of it.
    """

    rank: int
    world_size: int
    host: str
    step: int | None
    exit_code: int
    text: str
    is_mistake: bool = False
    is_echo: bool = False
    when: float = 0.0
    doing: str = ""
    is_lost: bool = False

    def to_json(self) -> str:
        """Return the failure as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """Return the failure that `to_json` wrote."""
        return cls(**json.loads(text))

    @property
    def at(self) -> str:
        """When it failed: `at step 197, micro-batch 3, in backward`."""
        step = "before its first step" if self.step is None else f"at step {self.step}"
        return f"{step}, {self.doing}" if self.doing else step

    @property
    def brief(self) -> str:
        """Return what failed in one line, for the other ranks to say."""
        lines = self.text.strip().splitlines() or [""]
        what = lines[-1] if lines[0].startswith("Traceback") else lines[0].split(". ")[0]
        what = what if len(what) <= _BRIEF else f"{what[:_BRIEF]} ..."
        ended = "ended" if self.is_mistake else f"{'was lost' if self.is_lost else 'failed'} {self.at}"
        return f"rank {self.rank} on host {self.host} {ended} ({what.rstrip('.')})"

    def __str__(self) -> str:
        if self.is_mistake:
            return self.text
        at = self.at
        rank = f"rank {self.rank} of {self.world_size}" if self.world_size > 1 else f"rank {self.rank}"
        if self.is_echo and any(word in self.text.lower() for word in _BETWEEN_RANKS):
            saw = self.text.rstrip().splitlines()[-1].split(". ")[0]
            return (
                f"{rank} on host {self.host} lost another rank {at}, which ended without a word (killed?). The end of "
                "the other ranks' output and `dmesg | tail` on their hosts may name the reason; most often a machine "
                f"ran out of memory. What rank {self.rank} saw: {saw}"
            )
        if self.is_lost:
            return f"{rank} on host {self.host} was lost {self.at}: {self.text} The other ranks were stopped."
        others = " The other ranks were stopped." if self.world_size > 1 else ""
        return f"{self.text.rstrip()}\n\n{rank} on host {self.host} failed {at}, exit code {self.exit_code}.{others}"


def from_exception(
    error: BaseException, rank: int, world_size: int, host: str, position: Position | None = None
) -> Failure:
    """Return the report of an exception that ended a rank. position: where it was then."""
    is_mistake = isinstance(error, DeepyError)
    text = str(error) if is_mistake else _traceback(error)
    exit_code = error.exit_code if isinstance(error, DeepyError) else 1
    is_echo = not is_mistake and any(echo in str(error).lower() for echo in _ECHOES)
    step, doing = _place(position)
    return Failure(rank, world_size, host, step, exit_code, text, is_mistake, is_echo, time.time(), doing)


def _place(position: Position | None) -> tuple[int | None, str]:
    return (None, "") if position is None else (position.step, position.doing())


def _traceback(error: BaseException) -> str:
    """Return the traceback without the launcher's own frames, which stand above the script's."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None and _is_ours(place.tb_frame.f_code.co_filename):
        place = place.tb_next
    return "".join(traceback.format_exception(type(error), error, place))


def _is_ours(filename: str) -> bool:
    return filename == "<frozen runpy>" or Path(filename).parent == Path(__file__).parent


def from_exit(
    status: int, peak_bytes: int, rank: int, world_size: int, host: str, position: Position | None = None
) -> Failure:
    """Return the report of a process that ended without one.

    status: the exit code, or minus the number of the signal that ended it. peak_bytes: its largest resident memory.
    position: where it was then.
    """
    text = explain_signal(-status, peak_bytes) if status < 0 else "The process ended without a message of its own."
    exit_code = 128 - status if status < 0 else status
    step, doing = _place(position)
    if status == signals.EXIT_CODE:
        text = f"stopped by a signal {signals.NOTHING_LOST} Exit code {status}."
        return Failure(rank, world_size, host, step, exit_code, text, is_mistake=True, when=time.time())
    return Failure(rank, world_size, host, step, exit_code, text, when=time.time(), doing=doing)


def from_silence(peak_bytes: int, rank: int, world_size: int, host: str, position: Position | None) -> Failure:
    """Return the report of a process that ended without a word, and whose exit code somebody else has collected."""
    text = (
        "The process ended without a word; its exit code went to its launcher. Most often it was killed (-9) because "
        f"the machine ran out of memory (not GPU memory). {_peak(peak_bytes)} `dmesg | tail` may name the reason."
    )
    step, doing = _place(position)
    return Failure(rank, world_size, host, step, 1, text, when=time.time(), doing=doing)


def from_loss(rank: int, world_size: int, host: str, position: Position | None, reached: int | None = None) -> Failure:
    """Return the report of a rank of which nothing is left to say anything.

    position: where it was heard of last. reached: the furthest step of the ranks; it was there, where it is later."""
    text = "that machine or its network is gone, or all of the rank's processes were killed at once."
    step, doing = _place(position)
    if reached is not None and (step is None or step < reached):
        step, doing = reached, ""
    return Failure(rank, world_size, host, step, 1, text, when=time.time(), doing=doing, is_lost=True)


def from_hang(text: str, rank: int, world_size: int, host: str) -> Failure:
    """Return the failure of a run that hangs, which `text` reports. rank: of those that are waited for."""
    return Failure(rank, world_size, host, None, 1, text, is_mistake=True, when=time.time())


def first_cause(failures: list[Failure]) -> Failure:
    """Return the failure to show: the earliest that is not an echo; of ranks that say the same, the lowest."""
    cause = min(failures, key=lambda failure: (failure.is_echo, failure.when, failure.rank))
    alike = [one for one in failures if (one.text, one.is_echo) == (cause.text, cause.is_echo)]
    return min(alike, key=lambda failure: failure.rank)


def explain_signal(number: int, peak_bytes: int) -> str:
    """Return what a signal that ended a process usually means, with the numbers of this machine."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    peak = _peak(peak_bytes)
    reasons = {
        signal.SIGKILL: f"most often because the machine ran out of memory (not GPU memory). {peak} Lower "
        "train_micro_batch_size_per_gpu or num_workers, or ask for more memory; `dmesg | tail` may name the reason.",
        signal.SIGBUS: f"most often because shared memory is full. {_shared_memory()} In a container, run it with "
        "`--shm-size=8g` or `--ipc=host`, or lower num_workers.",
        signal.SIGSEGV: "a crash inside native code. The stack that stands above, if any, shows where.",
        signal.SIGABRT: "raised by native code that gave up; its own message stands above.",
        signal.SIGILL: "an instruction that this processor lacks: a package was built for another one.",
        signal.SIGFPE: "an arithmetic error inside native code.",
        signal.SIGTERM: "sent from outside: a time limit, a pre-emption, or a person.",
        signal.SIGINT: "an interruption from outside.",
    }
    reason = reasons.get(signal.Signals(number), "") if number in set(signal.Signals) else ""
    return f"The process was ended by {name} (-{number}), {reason}".rstrip(", ")


def _peak(peak_bytes: int) -> str:
    return f"It had used up to {peak_bytes / GIBIBYTE:.1f} GiB of this machine's {total_memory() / GIBIBYTE:.1f} GiB."


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "/dev/shm is missing here."
    return f"/dev/shm has {usage.total / GIBIBYTE:.2f} GiB, of which {usage.free / GIBIBYTE:.2f} are free."
