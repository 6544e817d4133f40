"""What some steps of training did, whatever the layout: losses, norms, and every full gradient, on rank 0.

trace = trace_training(config, vocab_size, mesh)        # on every rank; the trace is whole on rank 0 only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.base import Engine
from megatron.engine.build import build_engine
from megatron.errors import EngineError, Problem
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import ShardSpec, get_spec, merge
from megatron.proof.shrink import STEPS, VOCABULARY


@dataclass(frozen=True)
class Gradient:
    """The full gradient of one parameter, fp32 on the CPU. stage: the first pipeline stage that holds it."""

    full: Tensor
    spec: ShardSpec
    stage: int


@dataclass(frozen=True)
class Trace:
    """One entry for each step; gradients by canonical name, in the order of the layers, before clipping.

    drift: what the engine says of copies that are not alike after the last step.
    """

    losses: list[float]
    norms: list[float]
    clipped: list[float]
    gradients: list[dict[str, Gradient]]
    drift: Sequence[Problem] = ()


@dataclass(frozen=True)
class _Share:
    """What one rank has of a gradient."""

    data: Tensor
    spec: ShardSpec
    tensor_rank: int
    stage: int


def trace_training(config: Config, vocab_size: int, mesh: Mesh) -> Trace:
    """Train STEPS steps on synthetic tokens; every rank of the mesh must call it.

    vocab_size: rows of the embedding, padding included. On other ranks than 0 the trace has no gradients.
    """
    engine = build_engine(config, mesh, build_model(config, vocab_size, mesh), build_objective())
    shown: list[dict[str, Tensor]] = [{} for _ in range(STEPS)]
    losses, norms, clipped = [], [], []
    for step in range(STEPS):
        watch(engine, shown[step])
        result = engine.train_step(micro_batches(config, step, mesh), step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        clipped.append(result.clipped_grad_norm)
    return Trace(losses, norms, clipped, _gather(engine, shown, mesh), _drift(engine))


def _drift(engine: Engine) -> Sequence[Problem]:
    """Return what is wrong with the copies of weights that several ranks hold; all ranks find the same."""
    try:
        engine.check_masters()
    except EngineError as error:
        return error.problems
    return ()


def watch(engine: Engine, into: dict[str, Tensor]) -> None:
    """Copy the gradients of the next step into a mapping by name."""
    engine.watch_gradients(lambda name, share: into.update({name: share.detach().float().cpu().clone()}))


def micro_batches(config: Config, step: int, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches of a global batch that is the same in every layout.

    Micro-batch i of data rank r holds rows (i * dp + r) * size and on. Loss masks are ragged: each row trains a part
    of its tokens, so that ranks and micro-batches differ in how many they train.
    """
    size, rows = config.batch.train_micro_batch_size_per_gpu, config.batch.train_batch_size
    length = config.model.seq_length
    generator = torch.Generator().manual_seed(1 + step)
    text = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
    trained = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length)[None] < trained).float()
    starts = [(i * mesh.dp.size + mesh.dp.rank) * size for i in range(config.batch.gradient_accumulation_steps)]
    return [Batch(text[s : s + size, :-1], text[s : s + size, 1:], mask[s : s + size]) for s in starts]


def _gather(engine: Engine, shown: list[dict[str, Tensor]], mesh: Mesh) -> list[dict[str, Gradient]]:
    """Return the full gradients on rank 0, of the first replica of each share."""
    specs = {name: get_spec(parameter) for name, parameter in engine.model.named_parameters()}
    mine = [
        {name: _Share(data, specs[name], mesh.tp.rank, mesh.pp.rank) for name, data in step.items()} for step in shown
    ]
    gathered: list[list[dict[str, _Share]] | None] = [None] * mesh.world.size
    if mesh.world.size == 1:
        gathered = [mine]
    else:
        places = gathered if mesh.world.rank == 0 else None
        dist.gather_object(mine if mesh.replicas.rank == 0 else None, places, dst=0, group=mesh.world.group)
    ranks = [rank for rank in gathered if rank is not None]
    return [_merge([rank[step] for rank in ranks]) for step in range(STEPS)] if ranks else []


def _merge(ranks: list[dict[str, _Share]]) -> dict[str, Gradient]:
    """Return full gradients of the shares of all ranks; of unsplit and of tied parameters the first one counts."""
    shares: dict[str, list[_Share]] = {}
    for rank in ranks:
        for name, share in rank.items():
            shares.setdefault(name, []).append(share)
    full = {}
    for name, held in shares.items():
        first = min(share.stage for share in held)
        held = sorted((share for share in held if share.stage == first), key=lambda share: share.tensor_rank)
        full[name] = Gradient(merge([share.data for share in held], held[0].spec), held[0].spec, first)
    return full
