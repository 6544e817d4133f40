"""What must be settled before torch is imported: the interpreter, and the variables that torch and DeepSpeed read.

Only the standard library is used here, and nothing newer than Python 3.8, so that an old system Python gets
a sentence instead of a syntax error. The scripts at the top call `prepare()` as their first act.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from urllib.parse import unquote

from megatron import signals
from megatron.launch.devices import visible_gpus

MINIMUM_PYTHON = (3, 11)
REQUIRED = ("yaml", "pydantic", "numpy", "torch", "deepspeed")
LAUNCH_TIME = "DEEPY_LAUNCH_TIME"
PAYLOAD_FLAG = "--deepy-payload"
ENVIRONMENT_FLAG = "--deepy-env"


def prepare(script: str, stoppable: bool = False) -> None:
    """Note the time of launch, make sure of an interpreter that has what we need, and settle the environment.

    script: path of the script that runs; `.venv/bin/python` is looked for beside it. Where this interpreter lacks
    a package and that one exists, the process continues in it (os.execv) and this function does not return.
    stoppable: SIGTERM and SIGUSR1 end this process with the exit code of a run that is to be started again, until
    whatever runs takes them itself; importing torch from a busy file system may take minutes.
    Exits with code 2 and the way to install where neither will do.
    """
    os.environ.setdefault(LAUNCH_TIME, repr(time.time()))
    lacking = missing_packages()
    if lacking:
        _use_other_interpreter(Path(script).resolve().parent, lacking)
    _apply_sent_environment(sys.argv)
    if stoppable:
        signals.open_inbox().on_first(_end_at_once)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if visible_gpus(os.environ) else "cpu")
    # DeepSpeed decorates functions with torch.compile when it is imported; nothing here is compiled by it, and
    # loading the compiler for that costs 0.7 s.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # OpenMP threads that spin while they wait take the cores from whoever has work: on two cores that were shared with
    # other processes, training ran at 390 to 530 tokens/s with spinning threads, at 2,200 to 2,400 with sleeping ones.
    # They spin for 10,000 turns first, about 0.1 ms, since the next piece of work mostly comes at once: 2 % of a step.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Importing torch and DeepSpeed creates a million objects that stay; collecting between them costs 0.1 to 0.2 s.
    # megatron.launch.entry switches the collector on again.
    gc.disable()


def _end_at_once(number: int) -> None:
    """End a process that has not begun; deepy.py, which has left its board here, says so itself.

    Ranks behind the first do not advise: a launcher ends them like this where rank 0 has failed, too."""
    rank = os.environ.get("RANK", "0")
    if "DEEPY_BOARD" in os.environ:
        pass
    elif rank != "0":
        sys.stderr.write("rank %s was ended by %s before its first step\n" % (rank, signal.Signals(number).name))  # noqa: UP031
    else:
        sys.stderr.write("\nstopped by %s %s\n" % (signal.Signals(number).name, signals.NOTHING_LOST))  # noqa: UP031
    signals.leave(signals.EXIT_CODE)


def _apply_sent_environment(argv: list) -> None:
    """Set the variables that the launcher on another machine sent as `--deepy-env KEY=VALUE`, percent-encoded."""
    for flag, word in zip(argv, argv[1:]):  # noqa: B905, RUF007 - an old Python has neither strict nor pairwise
        if flag == ENVIRONMENT_FLAG:
            key, value = word.split("=", 1)
            os.environ.setdefault(key, unquote(value))


def missing_packages() -> list:
    """Return what this interpreter lacks: names of packages, and "Python 3.11" where it is too old itself."""
    lacking = [] if sys.version_info >= MINIMUM_PYTHON else ["Python %d.%d" % MINIMUM_PYTHON]  # noqa: UP031
    return lacking + [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def _use_other_interpreter(folder: Path, lacking: list) -> None:
    """Continue in `folder`/.venv, or exit with the way to install."""
    other = folder / ".venv" / "bin" / "python"
    # sys.prefix, not the resolved executable: a virtual environment's python is a link to the system's.
    if other.exists() and Path(sys.prefix).resolve() != (folder / ".venv").resolve():
        os.execv(str(other), [str(other), *sys.argv])
    sys.stderr.write(
        f"{sys.executable} lacks {', '.join(lacking)}.\n"
        f"Install everything into {folder / '.venv'} with:\n\n    cd {folder} && make install\n\n"
        "and run the same command again; it will find that interpreter by itself.\n"
    )
    raise SystemExit(2)
