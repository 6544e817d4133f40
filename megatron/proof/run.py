"""The trial of a layout: trained as configured and by one process, compared, and told in one table.

passed = prove(shrink(config), mesh)         # on every rank; rank 0 prints
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.parallel.mesh import Mesh
from megatron.proof.compare import Comparison, compare
from megatron.proof.shrink import STEPS, Trial
from megatron.proof.trace import trace_training

_MOST_SHOWN, _MOST_DRIFTED = 10, 3


def prove(trial: Trial, mesh: Mesh) -> bool:
    """Return on every rank whether the layout computes what one process does; rank 0 prints the table.

    A trial in 16 bits is one in fp32 before, because fp32 shows errors that 16 bits hide in their rounding.
    """
    show(mesh, _opening(trial, mesh))
    precision = trial.config.numerics.precision
    passed = True
    for kind in dict.fromkeys(("fp32", precision)):
        passed &= _prove_in(trial if kind == precision else trial.in_precision(kind), mesh)
    show(mesh, ["", "PASS: this layout trains as one process does." if passed else
                "FAIL: this layout does not train as one process does. Please report it with the config."])  # fmt: skip
    return passed


def _prove_in(trial: Trial, mesh: Mesh) -> bool:
    """Run both sides in the trial's precision. The one process is rank 0, while the others wait."""
    ours = trace_training(trial.config, trial.vocab_size, mesh)
    verdict = torch.ones((), dtype=torch.int32, device=mesh.device)
    if mesh.world.rank == 0:
        theirs = trace_training(trial.reference, trial.vocab_size, Mesh.single(mesh.device))
        precision = trial.config.numerics.precision
        found = compare(ours, theirs, precision, mesh.tp.size)
        show(mesh, _table(precision, found))
        show(mesh, (f"    {problem.what}: {problem.why}" for problem in ours.drift[:_MOST_DRIFTED]))
        verdict.fill_(int(not ours.drift and all(comparison.passes for comparison in found)))
    if mesh.world.size > 1:
        dist.broadcast(verdict, src=0, group=mesh.world.group)
    return bool(verdict.item())


def show(mesh: Mesh, lines: Iterable[str]) -> None:
    """Print on rank 0."""
    if mesh.world.rank == 0:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()


def _opening(trial: Trial, mesh: Mesh) -> Iterator[str]:
    yield f"{layout(trial.config, mesh)} and one process, {STEPS} steps"
    if trial.changes:
        yield "smaller than the config: " + ", ".join(
            f"{key} {theirs} -> {ours}" for key, theirs, ours in trial.changes
        )
    yield from trial.notes


def layout(config: Config, mesh: Mesh) -> str:
    """Return the layout in words."""
    sizes = {"data": mesh.dp.size, "tensor": mesh.tp.size, "pipeline": mesh.pp.size, "context": mesh.cp.size}
    axes = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")
    more = [f"ZeRO {config.parallel.zero_optimization.get('stage', 0)}"]
    more += ["sequence parallel"] * config.parallel.sequence_parallel
    more += ["recomputation"] * config.training.checkpoint_activations
    kind = "GPUs, nccl" if mesh.device.type == "cuda" else "CPU, gloo"
    return f"{mesh.world.size} processes ({kind}): {axes}, {', '.join(more)}"


def _table(precision: str, found: Sequence[Comparison]) -> Iterator[str]:
    """Yield one line for each number and for the worst gradient of each step; then the first that differ."""
    shown = _shown(found)
    width = max(len(_title(comparison)) for comparison in shown)
    yield f"\n  {precision:<{width}} {'as configured':>14} {'one process':>14} {'difference':>11}   allowed"
    for comparison in shown:
        mark = "" if comparison.passes else "   <-- differs"
        values = f"{comparison.ours:>14.7g} {comparison.theirs:>14.7g} {comparison.error:>11.1e}"
        yield f"  {_title(comparison):<{width}} {values}   {comparison.allowed:.0e}{mark}"
    gradients = [comparison for comparison in found if comparison.is_gradient]
    wrong = [comparison for comparison in gradients if not comparison.passes]
    if wrong:
        yield f"\n  {len(wrong)} of {len(gradients)} gradients differ. The first to do so, largest difference first:"
        first = sorted((each for each in wrong if each.step == wrong[0].step), key=lambda each: -each.error)
        yield from (f"    {_title(each)}: {each.error:.1e} ({each.where})" for each in first[:_MOST_SHOWN])


def _title(comparison: Comparison) -> str:
    return f"{comparison.name}, step {comparison.step}"


def _shown(found: Sequence[Comparison]) -> list[Comparison]:
    """Return the numbers, and of each step's gradients the one that exceeds what is allowed most."""
    numbers = [comparison for comparison in found if not comparison.is_gradient]
    steps = {comparison.step: comparison for comparison in reversed(found) if comparison.is_gradient}
    gradients = [[c for c in found if c.is_gradient and c.step == step] for step in sorted(steps)]
    return numbers + [max(each, key=lambda c: c.error if c.error == c.error else float("inf")) for each in gradients]
