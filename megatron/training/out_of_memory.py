"""After an out-of-memory error: what was held beside what was planned, and the cheapest changes, in one message.

with explained(config, mesh, vocab_size) as scene:
    scene.engine = build_engine(...)        # as soon as there is one
    ...                                     # train
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron import whereabouts
from megatron.config.schema.config import Config
from megatron.engine.base import Engine
from megatron.engine.memory import Held, held
from megatron.engine.step import StepEngine
from megatron.errors import MemoryShortageError, Problem
from megatron.model.accounting import num_parameters
from megatron.parallel.mesh import Mesh
from megatron.planning.layout import Layout
from megatron.planning.memory import GIBIBYTE, RESERVE, StageMemory
from megatron.planning.plan import Planner
from megatron.planning.remedies import Remedy, remedies
from megatron.planning.speed import GPUS, assume
from megatron.training.room import Room, in_use, room

_WORDS = ("out of memory", "can't allocate memory", "defaultcpuallocator", "not enough memory", "alloc_failed")
"""What tells a lack of memory in errors that have no type of their own: on a CPU, in cuBLAS and in cuDNN."""


@dataclass
class Scene:
    """What is known of the run when it fails. before: bytes in use before there was a model. engine: None while there
    is none."""

    before: int
    engine: Engine | None = None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


@contextmanager
def explained(config: Config, mesh: Mesh, vocab_size: int) -> Iterator[Scene]:
    """Within it, a lack of memory becomes a MemoryShortageError. vocab_size: rows of the word embedding."""
    scene = Scene(in_use(mesh.device))
    try:
        yield scene
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortageError(_problem(error, scene, config, mesh, vocab_size)) from error


def make_planner(config: Config, vocab_size: int, device: torch.device) -> Planner:
    """Return what plans the memory of a run on this kind of device; its times are of no particular one."""
    reserve = RESERVE if device.type == "cuda" else 0.0
    return Planner(config, vocab_size, assume(GPUS["H100"], num_parameters(config.model, vocab_size)), reserve)


def _problem(error: Exception, scene: Scene, config: Config, mesh: Mesh, vocab_size: int) -> Problem:
    planner, layout = make_planner(config, vocab_size, mesh.device), Layout.of(config)
    found = held(scene.engine, mesh.device) if isinstance(scene.engine, StepEngine) else None
    memory = room(mesh.device)
    step, rank = whereabouts.current().step, f" of rank {mesh.world.rank}" if mesh.world.size > 1 else ""
    when = "before the first step" if step is None else f"at step {step}"
    said = str(error).strip().splitlines() or [type(error).__name__]
    table = _table(found, scene.before, memory, planner.memory(layout)[mesh.pp.rank])
    ways = [line for number, way in enumerate(remedies(planner, layout), start=1) for line in _lines(number, way)]
    advice = ["What would need less, the cheapest first, each with what it saves by the plan:", *ways]
    return Problem(
        what=f"{mesh.device}{rank}",
        why="\n".join([f"out of memory {when}: {said[0]}", *table]),
        fix="\n"
        + "\n".join(advice if ways else ["No change of these settings would need less; use more or larger GPUs."]),
    )


def _table(found: Held | None, before: int, memory: Room, plan: StageMemory) -> list[str]:
    """Return what was measured beside what is planned, in GiB."""
    state, other = plan.state, plan.activations + plan.loss + plan.working + plan.buffers
    rows: list[tuple[str, int | None, int]] = [
        ("weights", None if found is None else found.weights, state.weights),
        ("masters", None if found is None else found.masters, state.masters),
        ("moments", None if found is None else found.moments, state.moments),
        ("gradients", None if found is None else found.gradients, state.gradients),
        (
            "activations, logits, workspace",
            None if found is None else max(0, memory.peak - before - found.total),
            other,
        ),
        ("before the model", before, plan.reserve),
        ("peak", memory.peak, plan.total),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {'GiB':<{width}}  measured  planned"]
    lines += [f"  {name:<{width}}  {_gib(here):>8}  {_gib(there):>7}" for name, here, there in rows]
    return [*lines, f"  of {_gib(memory.total)} GiB, {_gib(memory.free)} were free when this was written."]


def _lines(number: int, remedy: Remedy) -> list[str]:
    first, *rest = remedy.yaml().splitlines()
    start = f"  {number}. {_gib(remedy.saved):>7} GiB  {remedy.name}: "
    return [start + first, *(" " * len(start) + line for line in rest)]


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / GIBIBYTE:.2f}" if number >= 1e7 else f"{number / GIBIBYTE:.2g}"
