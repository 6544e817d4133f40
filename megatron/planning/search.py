"""Other layouts of the same training run: the same model and global batch on the same GPUs.

`changes` looks for the cheapest way out where a layout does not fit; `search` ranks all layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from megatron.planning.layout import Layout, least_stage
from megatron.planning.memory import is_adam
from megatron.planning.plan import Plan, Planner

CHEAP = ("norm", "activation")
"""Operations that are recomputed at hardly any time."""

_SMALL_BUCKET = 50_000_000
_MOST_CHANGES = 3

Fields = dict[str, int | bool | tuple[str, ...] | None]
"""Fields of a Layout, with other values."""


@dataclass(frozen=True)
class Change:
    """A set of changed keys that makes a run fit. cost: share by which a step takes longer; negative is faster."""

    settings: dict[str, object]
    plan: Plan
    cost: float


def changes(planner: Planner, before: Plan, limit: float, count: int = 3) -> list[Change]:
    """Return the `count` cheapest sets of changes with which the fullest GPU needs at most `limit` bytes.

    Sets of one key are tried first; larger sets count only where none of their parts is enough. Sorted by time."""
    found: list[tuple[frozenset[str], Layout]] = []
    moves = list(_moves(planner, before.layout))
    for size in range(1, _MOST_CHANGES + 1):
        for chosen in combinations(moves, size):
            names = frozenset(name for name, _ in chosen)
            axes = [name.split("=")[0] for name in names]
            if len(set(axes)) < len(axes) or any(smaller <= names for smaller, _ in found):
                continue
            layout = combine(before.layout, [change for _, change in chosen])
            if layout is not None and planner.is_possible(layout) and planner.peak(layout) <= limit:
                found.append((names, layout))
        if len(found) >= 4 * count:
            break
    plans = sorted((planner.plan(layout) for layout in dict.fromkeys(one for _, one in found)), key=_time)
    return [
        Change(plan.layout.settings(before.layout), plan, plan.speed.step / before.speed.step - 1)
        for plan in plans[:count]
    ]


def _moves(planner: Planner, layout: Layout) -> Iterator[tuple[str, Fields]]:
    """Yield (axis=value, fields) of single changes; the data axis and accumulation follow from them."""
    if not layout.recompute:
        yield "recompute=1", {"recompute": 1, "operations": (), "first": None}
        if not layout.operations:
            yield "recompute=operations", {"operations": CHEAP, "first": None}
    if is_adam(planner.config) and layout.moment_bytes == 4 and not layout.offload:
        yield "moments=2", {"moment_bytes": 2}
    if not layout.travels:
        yield "travels=1", {"travels": True}
    if layout.tp > 1 and not layout.sequence_parallel:
        yield "sequence=1", {"sequence_parallel": True}
    for factor in (2, 4, 8):
        if layout.micro_batch % factor == 0:
            yield f"micro={factor}", {"micro_batch": layout.micro_batch // factor}
        if layout.dp % factor == 0 and layout.tp * factor <= planner.assumptions.node:
            yield f"tp={factor}", {"tp": layout.tp * factor}
        if layout.dp % factor == 0:
            yield f"pp={factor}", {"pp": layout.pp * factor}
    for stage in range(layout.zero_stage + 1, 4):
        yield f"zero={stage}", {"zero_stage": stage}
    if layout.zero_stage and layout.bucket > _SMALL_BUCKET:
        yield "bucket=1", {"bucket": _SMALL_BUCKET}
    if layout.zero_stage and not layout.offload:
        yield "offload=1", {"offload": True}


def combine(layout: Layout, fields: list[Fields]) -> Layout | None:
    """Return the layout with these fields and the same GPUs and global batch; None where they do not divide."""
    merged = {name: value for change in fields for name, value in change.items()}
    changed = layout.changed(**merged)
    changed = changed.changed(zero_stage=max(changed.zero_stage, least_stage(changed.pp)))
    return _rebalanced(changed, layout.gpus, layout.batch)


def _rebalanced(layout: Layout, gpus: int, batch: int) -> Layout | None:
    """Return the layout whose data axis and accumulation make up `gpus` and `batch`; None where there is none."""
    dp, rest = divmod(gpus, layout.tp * layout.pp * layout.cp)
    if rest or not dp:
        return None
    accumulation, rest = divmod(batch, dp * layout.micro_batch)
    return None if rest or not accumulation else layout.changed(dp=dp, accumulation=accumulation)


def search(planner: Planner, layout: Layout, limit: float, count: int = 10) -> list[Plan]:
    """Return the `count` fastest layouts that fit into `limit` bytes, fastest first.

    All of tensor x pipeline x data x ZeRO x micro-batch x recomputation are tried, with the global batch, the GPUs and
    the rest of `layout`; the tensor axis stays within a node. Of layouts that differ in the ZeRO stage alone, the one
    with the lowest stage that fits stands for all."""
    fitting = [one for one in _all(planner, layout) if planner.is_possible(one) and planner.peak(one) <= limit]
    lowest: dict[Layout, Layout] = {}
    for one in sorted(fitting, key=lambda one: one.zero_stage):
        lowest.setdefault(one.changed(zero_stage=0), one)
    ranked = sorted((planner.plan(one, simulate=False) for one in lowest.values()), key=_time)
    return sorted((planner.plan(plan.layout) for plan in ranked[:count]), key=_time)


def _all(planner: Planner, layout: Layout) -> Iterator[Layout]:
    gpus, batch = layout.gpus // layout.cp, layout.batch
    for tp in _divisors(gpus, planner.assumptions.node):
        for pp in _divisors(gpus // tp, planner.config.model.num_layers):
            dp = gpus // (tp * pp)
            for micro in _divisors(batch // dp, 64) if batch % dp == 0 else ():
                for stage in (1,) if pp > 1 else (0, 1, 2, 3):
                    for recompute in (0, max(1, layout.recompute)):
                        yield layout.changed(
                            dp=dp,
                            tp=tp,
                            pp=pp,
                            micro_batch=micro,
                            accumulation=batch // dp // micro,
                            zero_stage=stage,
                            recompute=recompute,
                            operations=() if recompute else layout.operations,
                            first=layout.first if bool(recompute) == bool(layout.recompute) else None,
                            sequence_parallel=layout.sequence_parallel and tp > 1,
                            offload=layout.offload and stage > 0,
                        )


def _divisors(number: int, most: int) -> list[int]:
    return [candidate for candidate in range(1, min(number, most) + 1) if number % candidate == 0]


def _time(plan: Plan) -> tuple[float, int]:
    return plan.speed.step, plan.peak
