"""The sizes that a micro-batch may have within a global batch, and the largest that fits by the plan."""

from __future__ import annotations

from megatron.planning.layout import Layout
from megatron.planning.plan import Planner


def sizes(layout: Layout) -> list[int]:
    """Return the micro-batches that divide what one process computes in a step, in sequences, ascending."""
    own = layout.micro_batch * layout.accumulation
    return [size for size in range(1, own + 1) if own % size == 0]


def sized(layout: Layout, size: int) -> Layout:
    """Return the layout with micro-batches of `size` and the same global batch."""
    return layout.changed(micro_batch=size, accumulation=layout.micro_batch * layout.accumulation // size)


def largest(planner: Planner, layout: Layout, limit: float) -> int | None:
    """Return the largest micro-batch with which the fullest GPU needs at most `limit` bytes; None where none fits."""
    fitting = [size for size in sizes(layout) if planner.peak(sized(layout, size)) <= limit]
    return max(fitting, default=None)
