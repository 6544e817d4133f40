"""What a script at the top hands itself to: read the config, join the run, work, and fail in an orderly way.

    from megatron.launch.prelude import prepare
    prepare(__file__)                                   # before torch is imported
    from megatron.launch.entry import run_worker
    from megatron.training.run import train
    sys.exit(run_worker(train, sys.argv[1:]))

The same script runs under `deepy.py`, torchrun, srun, mpirun, plain RANK/WORLD_SIZE/MASTER_ADDR, or by itself.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from urllib.parse import unquote

from megatron.config.schema.config import Config
from megatron.config.transport import unpack
from megatron.errors import DeepyError
from megatron.launch.arguments import ENVIRONMENT_FLAG, PAYLOAD_FLAG, parse_arguments
from megatron.launch.failure import from_exception
from megatron.launch.place import Place, find_place
from megatron.launch.read_config import read_config
from megatron.launch.worker import Worker, find_board, report, start_worker
from megatron.logs import current_step
from megatron.parallel.mesh import Mesh

Work = Callable[[Config, Mesh], object]


def run_worker(work: Work, argv: list[str]) -> int:
    """Run `work(config, mesh)` as one rank; return the exit code.

    argv: the launcher's payload, or what a person writes: `configs/a.yml configs/b.yml --set key=value`.
    An exception is reported once, by the launcher that supervises this process, or by the first rank that failed.
    """
    gc.enable()
    gc.freeze()
    place, worker = Place(), None
    try:
        config, place = _read(argv)
        worker = start_worker(config, place, find_board(os.environ))
        work(config, worker.mesh)
        worker.finish()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _fail(error, place, worker)
    return 0


def _read(argv: list[str]) -> tuple[Config, Place]:
    """Return the config and this process's place, from a launcher's payload or from files."""
    if PAYLOAD_FLAG not in argv:
        place = find_place(os.environ)
        return read_config(parse_arguments(argv), place.world_size), place
    payload = argv[argv.index(PAYLOAD_FLAG) + 1]
    for flag, word in itertools.pairwise(argv):
        if flag == ENVIRONMENT_FLAG:
            key, value = word.split("=", 1)
            os.environ.setdefault(key, unquote(value))
    config = unpack(payload)
    return config, find_place(os.environ, config.launcher.master_port)


def _fail(error: Exception, place: Place, worker: Worker | None) -> int:
    """Report the end of this rank and return its exit code."""
    failure = from_exception(error, place.rank, place.world_size, place.host, current_step())
    board = find_board(os.environ)
    if report(failure, board, worker.watch if worker else None):
        print(f"\n{failure}", file=sys.stderr, flush=True)
    elif board is None and not isinstance(error, DeepyError):
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        print(f"rank {place.rank} on host {place.host} failed as well: {last}", file=sys.stderr, flush=True)
    return failure.exit_code
