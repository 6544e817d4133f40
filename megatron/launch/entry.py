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
import os
import sys
import time
from collections.abc import Callable, Mapping

from megatron import signals, whereabouts
from megatron.config.places import locate_error
from megatron.config.schema.config import Config
from megatron.config.transport import unpack, unpack_files
from megatron.errors import DeepyError
from megatron.launch import check
from megatron.launch.arguments import parse_arguments
from megatron.launch.decoding import decoding_processes
from megatron.launch.ending import end_at_once, tell_stopped
from megatron.launch.failure import Failure, from_exception
from megatron.launch.lean import defer_compiler
from megatron.launch.place import Place, find_place
from megatron.launch.prelude import PAYLOAD_FLAG
from megatron.launch.read_config import read_settings, resolve_for
from megatron.launch.watch import PeerWatch
from megatron.launch.worker import decoding_worker, find_board, report, start_worker
from megatron.logs import get_logger
from megatron.parallel.mesh import Mesh
from megatron.training.stop import Outcome

Work = Callable[[Config, Mesh, Mapping[str, str]], object]
logger = get_logger(__name__)


def run_worker(work: Work, argv: list[str], decoding: bool = False) -> int:
    """Run `work(config, mesh, config_files)` as one rank; return the exit code.

    config_files: name -> text of the files that the config was read from.
    argv: the launcher's payload, or what a person writes: `configs/a.yml configs/b.yml --set key=value`.
    decoding: only as many processes work as share the model to generate text, whatever layout the config trains with
        (`launch/decoding.py`); they are the mesh's tensor axis, and further ranks have nothing to do.
    A run that was asked to stop says so once, and returns the code that asks for another turn (`launch/ending.py`).
    An exception is reported once, by the launcher that supervises this process, or by the first rank that failed.
    """
    gc.enable()
    gc.freeze()
    defer_compiler()
    whereabouts.reset()
    place, watch = Place(), None
    try:
        place = find_place(os.environ)
        config, files = _read(argv, None if decoding else place.world_size)
        place = place.listening_at(config.launcher.master_addr, config.launcher.master_port)
        if decoding:
            place = place.among(decoding_processes(config, place.world_size))
            if place.rank >= place.world_size:
                return 0
        board = find_board(os.environ)
        if board is not None:
            board.hold_position(place.local_rank)
        elif place.world_size > 1 or not decoding:
            minutes = None if decoding else config.launcher.hang_timeout_minutes
            watch = PeerWatch(place, None if minutes is None else 60 * minutes)
        if signals.is_open():
            end_at_once(config, place, board, watch)
        start = decoding_worker if decoding else start_worker
        worker = start(config, place, board, watch)
        try:
            if not decoding:
                logger.info(f"{check.report(config)}\n")
            outcome = work(config, worker.mesh, files)
        except DeepyError as error:
            raise locate_error(error, files, config.flat()) from error.__cause__
        stopped = outcome.stopped if isinstance(outcome, Outcome) else None
        exit_code = 0 if stopped is None else tell_stopped(stopped, config, place, board)
        worker.finish()
    except KeyboardInterrupt:
        return _interrupted(place, watch)
    except Exception as error:
        return _fail(error, place, watch)
    return exit_code


def _read(argv: list[str], world_size: int | None) -> tuple[Config, Mapping[str, str]]:
    """Return the config of a launcher's payload, or of files for `world_size` processes (None: as planned there), and
    the texts of the files."""
    if PAYLOAD_FLAG in argv:
        word = argv[argv.index(PAYLOAD_FLAG) + 1]
        return unpack(word), unpack_files(word)
    settings = read_settings(parse_arguments(argv))
    return resolve_for(settings, world_size, planning=world_size is None), settings.texts()


def _fail(error: Exception, place: Place, watch: PeerWatch | None) -> int:
    """Report the end of this rank and return its exit code."""
    failure = from_exception(error, place.rank, place.world_size, place.host, whereabouts.current())
    if report(failure, find_board(os.environ), watch):
        if place.rank > 0:
            # Before the ranks have met, all are likely to fail for the same reason: rank 0 is given the time to say it.
            if signals.is_open():
                signals.open_inbox().on_first(lambda number: signals.leave(failure.exit_code))
            time.sleep(2)
            if watch is None and failure.is_mistake and place.is_local_known and place.local_rank > 0:
                return failure.exit_code  # the config, of which one rank of each host speaks
        print(f"\n{failure}", file=sys.stderr, flush=True)
    return failure.exit_code


def _interrupted(place: Place, watch: PeerWatch | None) -> int:
    """Let the other ranks end as well after Ctrl-C, which reaches all of them only in one terminal."""
    if watch is not None:
        text = f"stopped by SIGINT on rank {place.rank}, host {place.host}."
        failure = Failure(place.rank, place.world_size, place.host, None, 130, text, is_mistake=True, when=time.time())
        watch.announce(failure)
    return 130
