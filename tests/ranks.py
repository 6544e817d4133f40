"""Runs a function on several gloo ranks, forked from the pytest process: 0.3 s a test instead of 10.

The pytest process imports torch and deepspeed once; each rank is a fork that has them already. Use it as

    def check(x):                       # runs on every rank; torch.distributed is ready
        return dist.get_rank() + x

    assert run_ranks(2, check, 10) == [10, 11]

A closure works, since nothing is pickled on the way in. What a rank returns, or raises, is pickled on the
way back: return plain values or small CPU tensors.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

_PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._inductor.config",
    "torch._subclasses.schema_check_mode",
    "deepspeed",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.bf16_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.ticker",
    "megatron.engine.through_deepspeed",
    "megatron.model.build",
    "megatron.ops.cpu.activations",
    "megatron.ops.cpu.adamw",
    "megatron.ops.cpu.attention",
    "megatron.ops.cpu.cross_entropy",
    "megatron.ops.cpu.norms",
    "megatron.ops.cpu.rotary",
)


class RankError(Exception):
    """A rank that died, hung, or raised something that cannot be pickled."""


@dataclass
class _Rank:
    number: int
    pid: int
    connection: Connection


@functools.cache
def preload() -> None:
    """Import what the ranks need, and do once what each would do first, once per process (5 s)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in _PRELOADED:
        importlib.import_module(name)
    import deepspeed
    import torch

    # The shared-memory operation costs a minute of g++ and training never uses it.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    torch.set_num_threads(1)  # a fork of a process with an OpenMP team hangs in its first parallel region
    _build_a_model()


def _build_a_model() -> None:
    """Build a small decoder: what computes its operations is tried, and makes tables and pages of its own for that."""
    from PIL import Image

    from megatron.config.resolve import resolve
    from megatron.model.build import build_model
    from megatron.parallel.mesh import Mesh

    Image.preinit()  # of the plots
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8}
    build_model(resolve({**sizes, "max_position_embeddings": 8}, world_size=1), 48, Mesh.single())


def run_ranks(n: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Run `function(*args)` on `n` ranks of one gloo group and return what each returned, in order of rank.

    timeout: seconds for the whole run, after which all ranks are killed.
    Raises the exception of the first rank that failed, with that rank's traceback as a note, after the
    others have been killed; RankError where a rank died, hung or could not say what went wrong.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        ranks = [_start(rank, n, folder, function, args, timeout) for rank in range(n)]
        try:
            return _collect(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                _end(rank)


def _start(rank: int, n: int, folder: str, function: Callable[..., Any], args: tuple, timeout: float) -> _Rank:
    receiver, sender = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        sender.close()
        return _Rank(rank, pid, receiver)
    try:
        gc.freeze()  # else each collection would go through, and copy, all that pytest has made
        receiver.close()
        succeeded, answer = _work(rank, n, folder, function, args, timeout)
        sender.send_bytes(answer)
        if not succeeded:  # an exit would give the other ranks an error of their own, and hide this one
            time.sleep(min(timeout, 10))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _work(
    rank: int, n: int, folder: str, function: Callable[..., Any], args: tuple, timeout: float
) -> tuple[bool, bytes]:
    """Run inside the fork; the answer is pickled as (succeeded, value or exception, traceback)."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=n,
            timeout=datetime.timedelta(seconds=timeout),
        )
        value = function(*args)
        dist.barrier()
        return True, pickle.dumps((True, value, ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)
        except Exception:
            answer = pickle.dumps((False, None, text))
        return False, answer


def _collect(ranks: list[_Rank], deadline: float) -> list[Any]:
    waiting = {rank.connection: rank for rank in ranks}
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(rank.number for rank in waiting.values())
            raise RankError(f"ranks {silent} of {len(ranks)} had not answered when the time was up")
        for connection in ready:
            rank = waiting.pop(connection)
            results[rank.number] = _answer(rank)
    return [results[number] for number in range(len(ranks))]


def _answer(rank: _Rank) -> Any:
    try:
        succeeded, value, text = pickle.loads(rank.connection.recv_bytes())
    except EOFError:
        _, status = os.waitpid(rank.pid, 0)
        rank.pid = 0
        raise RankError(f"rank {rank.number} died, exit status {os.waitstatus_to_exitcode(status)}") from None
    if succeeded:
        return value
    if value is None:
        raise RankError(f"rank {rank.number} failed:\n{text}")
    value.add_note(f"on rank {rank.number}:\n{text}")
    raise value


def _end(rank: _Rank) -> None:
    rank.connection.close()
    if not rank.pid:
        return
    done, _ = os.waitpid(rank.pid, os.WNOHANG)
    if not done:
        try:
            os.kill(rank.pid, signal.SIGKILL)
        finally:
            os.waitpid(rank.pid, 0)
