"""Over what a run is spread, as a checkpoint records it and as messages say it. Nothing depends on it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.schema.config import Config
from megatron.parallel.mesh import Mesh

_ALWAYS, _WHERE_SET = ("tp", "pp", "dp"), ("cp", "ep")


def topology_of(mesh: Mesh, config: Config) -> dict[str, int]:
    """Return the sizes of all axes, and the ZeRO stage that the config asks for."""
    sizes = {axis: getattr(mesh, axis).size for axis in ("dp", "tp", "pp", "cp", "ep", "world")}
    return {**sizes, "zero": int(config.parallel.zero_optimization.get("stage", 0))}


def describe(topology: Mapping[str, int]) -> str:
    """Return a topology as "tp2 pp2 dp1 zero1"; cp and ep where they are more than 1, and only what was recorded."""
    names = [axis for axis in _ALWAYS if axis in topology] + [a for a in _WHERE_SET if topology.get(a, 1) > 1]
    words = [f"{axis}{topology[axis]}" for axis in names]
    return " ".join(words + ([f"zero{topology['zero']}"] if "zero" in topology else []))


def say_resharding(before: Mapping[str, int], now: Mapping[str, int], num_tensors: int) -> str:
    """Return what a load did, such as `checkpoint tp2 pp2 dp1 zero1 -> run tp1 pp1 dp2 zero2: 148 tensors re-sharded`.

    before: as a manifest records it. num_tensors: of the model, with all that belongs to each.
    """
    if describe(before) == describe(now):
        return f"checkpoint and run are both {describe(now)}: {num_tensors} tensors loaded"
    theirs = describe(before) or "of another program"
    return f"checkpoint {theirs} -> run {describe(now)}: {num_tensors} tensors re-sharded"
