"""One step that all ranks take, and that fails on all of them where it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron.errors import CheckpointError, DamagedCheckpointError, DeepyError, Problem
from megatron.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome:
    """What one rank reports: a value, or what went wrong."""

    value: object = None
    problems: tuple[Problem, ...] = ()
    is_damage: bool = False


def together(mesh: Mesh, action: Callable[[], T], explain: Callable[[OSError], Problem]) -> list[T]:
    """Run `action` on every rank and return the results of all in rank order; a single process needs no group.

    explain: turns an error of the file system into a Problem.
    Raises CheckpointError on every rank, with the problems of all that failed, where any failed; where one of them
    found damage, DamagedCheckpointError. An exception that is a bug keeps its traceback on the rank that raised it.
    """
    bug: Exception | None = None
    try:
        mine = _Outcome(action())
    except DeepyError as error:
        mine = _Outcome(problems=tuple(error.problems), is_damage=isinstance(error, DamagedCheckpointError))
    except OSError as error:
        mine = _Outcome(problems=(_explained(error, explain),))
    except Exception as error:
        bug = error
        mine = _Outcome(problems=(Problem(f"rank {mesh.world.rank} failed", repr(error), "See its traceback."),))
    outcomes = _gather(mesh, mine)
    if bug is not None:
        raise bug
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    if problems:
        kind = DamagedCheckpointError if any(outcome.is_damage for outcome in outcomes) else CheckpointError
        raise kind(*dict.fromkeys(problems))
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]


def _explained(error: OSError, explain: Callable[[OSError], Problem]) -> Problem:
    """Return the problem behind an error, also where looking for its reason fails: the other ranks wait to hear."""
    try:
        return explain(error)
    except Exception:
        return Problem("the storage", f"{error.strerror or error}.", "See that it answers.")


def _gather(mesh: Mesh, mine: _Outcome) -> list[_Outcome]:
    """Return the outcomes of all ranks in rank order."""
    if mesh.world.size == 1:
        return [mine]
    outcomes: list[_Outcome | None] = [None] * mesh.world.size
    dist.all_gather_object(outcomes, mine, group=mesh.world.group)
    return [outcome for outcome in outcomes if outcome is not None]
