"""A plan in words and numbers: a table for the terminal, plain data for a file."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from megatron.config.schema.config import Config
from megatron.optim.schedules import decay_horizon, learning_rate
from megatron.planning.communication import Traffic
from megatron.planning.layout import Layout
from megatron.planning.memory import GIBIBYTE, StageMemory
from megatron.planning.plan import Plan
from megatron.planning.search import Change
from megatron.planning.speed import Assumptions, peak

_DAY = 86400.0
_WIDTH = 120


def describe(layout: Layout) -> str:
    """Return a layout in one line."""
    context = f" x context {layout.cp}" if layout.cp > 1 else ""
    extra = [
        f"ZeRO {layout.zero_stage}",
        _recomputation(layout),
        *(["sequence parallel"] if layout.sequence_parallel else []),
        *(["optimizer on the CPU"] if layout.offload else []),
        *(["moments in bf16"] if layout.moment_bytes == 2 else []),
        *(["updates in the backward pass"] if layout.at_once else []),
        *(["activations on the CPU"] if layout.travels else []),
    ]
    return (
        f"data {layout.dp} x tensor {layout.tp} x pipeline {layout.pp}{context}, micro-batch {layout.micro_batch} x "
        f"accumulation {layout.accumulation}, {', '.join(extra)}"
    )


def _recomputation(layout: Layout) -> str:
    if not (layout.recompute or layout.operations):
        return "no recomputation"
    what = "" if layout.recompute else f" of {' and '.join(layout.operations)}"
    where = "" if layout.first is None else f" in the first {layout.first} blocks"
    return f"recomputation{what}{where}"


def memory_table(plan: Plan) -> list[str]:
    """Return the memory of each stage by term, in GiB; terms that are nothing anywhere are left out."""
    header = ["stage", "blocks", "parameters", "weights", "masters", "moments", "gradients", "activations", "loss",
              "working", "buffers", "update", "peak", "on the CPU"]  # fmt: skip
    rows: list[list[str]] = []
    for stage in plan.memory:
        blocks = "-" if stage.layers is None else f"{stage.layers[0]}-{stage.layers[1]}"
        rows.append(
            [
                str(stage.stage),
                blocks,
                _count(stage.num_parameters),
                *map(_gib, (size for name, size in _terms(stage).items() if name != "reserve")),
            ]
        )
    kept = [i for i, name in enumerate(header) if i < 3 or name == "peak" or any(row[i] != "0.00" for row in rows)]
    return _table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _terms(stage: StageMemory) -> dict[str, int]:
    state = stage.state
    return {
        "weights": state.weights, "masters": state.masters, "moments": state.moments, "gradients": state.gradients,
        "activations": stage.activations, "loss": stage.loss, "working": stage.working, "buffers": stage.buffers,
        "update": stage.update, "reserve": stage.reserve, "total": stage.total,
        "travelling": stage.travelling,
    }  # fmt: skip


def verdict(plan: Plan, limit: float) -> str:
    """Return whether the fullest GPU fits into `limit` bytes, and by how much."""
    stage = plan.fullest
    place = f"stage {stage.stage}" if len(plan.memory) > 1 else "each GPU"
    moment = "backward pass" if stage.backward >= stage.total else "update"
    need = f"{stage.total / GIBIBYTE:.1f} of {limit / GIBIBYTE:g} GiB, {place} in the {moment}"
    if stage.total <= limit:
        return f"Fits: {need}."
    return f"Does not fit: {need}; {(stage.total - limit) / GIBIBYTE:.1f} GiB too much."


def traffic_lines(plan: Plan) -> list[str]:
    """Return what the busiest GPU sends over each axis in one step."""
    busiest = max(plan.traffic, key=lambda sent: sum(one.sent for one in sent))
    if not busiest:
        return ["  nothing: one GPU"]
    rows = [
        [one.axis, str(one.size), one.operation, _bytes(one.payload), _bytes(one.sent), "yes" if one.hidden else "no"]
        for one in busiest
    ]
    return _table(["axis", "GPUs", "operation", "payload", "sent", "overlapped"], rows, left=3)


def speed_lines(config: Config, plan: Plan, assumptions: Assumptions) -> list[str]:
    """Return time, throughput and length of the run, and what the estimate rests on."""
    speed, layout, rate = plan.speed, plan.layout, plan.speed.tokens_per_second
    rows = [
        ("step", f"{speed.step:.3g} s: compute {speed.compute:.3g} (of it recomputation {speed.recompute:.3g}), "
                 f"communication {speed.exposed:.3g}, update {speed.optimizer:.2g}, pipeline idle {speed.idle:.1%}"),
        ("throughput", f"{rate:,.0f} tokens/s, {rate / layout.gpus:,.0f} per GPU"),
    ]  # fmt: skip
    if layout.pp > 1:
        equal = f"{plan.bubble:.1%} with equal stages: (p-1)/(m+p-1), p = {layout.pp}, m = {layout.accumulation}"
        rows.append(("bubble", f"{speed.idle:.1%} as simulated with these stages; {equal}"))
    iterations = config.training.train_iters
    if iterations:
        total = iterations * layout.batch * config.model.seq_length
        days = iterations * speed.step / _DAY
        rows.append(("length", f"{days:,.3g} days for {iterations:,} steps = {total / 1e9:,.4g} billion tokens"))
    gpu, node, most = assumptions.gpu, assumptions.node, peak(config, assumptions.gpu)
    rows.append(("rests on", f"MFU {assumptions.mfu:.0%} of {most:g} TFLOP/s without recomputation, idling and waiting "
                             f"({assumptions.source}; --mfu sets it), {gpu.link:g} GB/s within {node} GPUs "
                             f"of a node, {gpu.network:g} GB/s between nodes"))  # fmt: skip
    return [line for name, text in rows for line in _wrapped(f"  {name:<11} ", text)]


def rate_lines(config: Config) -> list[str]:
    """Return the learning rate at its landmarks; nothing where the length of the run is not known."""
    text = ", ".join(f"{rate:.3g} at {step:,}" for step, rate in rates(config).items())
    return _wrapped("Learning rate: ", text) if text else []


def rates(config: Config) -> dict[int, float]:
    """Return {step: learning rate} at the start, the end of the warm-up, the quarters and the end, where it has one."""
    iterations, optimizer = config.training.train_iters, config.optimizer
    if iterations is None:
        return {}
    warm = round(optimizer.warmup * decay_horizon(optimizer, iterations))
    steps = {0, min(warm, iterations), *(round(iterations * part) for part in (0.25, 0.5, 0.75, 1))}
    return {step: learning_rate(optimizer, iterations, step) for step in sorted(steps)}


def change_lines(changes: Sequence[Change]) -> list[str]:
    """Return the changes, each with its memory and its cost in time."""
    lines = []
    for number, change in enumerate(changes, start=1):
        words = ", ".join(f"{key}: {_value(value)}" for key, value in change.settings.items())
        lines += _wrapped(f"  {number}. ", words)
        lines.append(f"     {change.plan.peak / GIBIBYTE:.1f} GiB, a step takes {change.plan.speed.step:.3g} s "
                     f"({change.cost:+.1%})")  # fmt: skip
    return lines


def ranking(plans: Sequence[Plan]) -> list[str]:
    """Return layouts as a table, in their order."""
    header = ["", "data", "tensor", "pipeline", "ZeRO", "micro-batch", "accumulation", "recompute", "GiB", "tokens/s",
              "step s", "idle"]  # fmt: skip
    rows = []
    for number, plan in enumerate(plans, start=1):
        layout, speed = plan.layout, plan.speed
        rows.append([
            *map(str, (number, layout.dp, layout.tp, layout.pp, layout.zero_stage, layout.micro_batch)),
            str(layout.accumulation), "yes" if layout.recompute or layout.operations else "no",
            f"{plan.peak / GIBIBYTE:.1f}", f"{speed.tokens_per_second:,.0f}", f"{speed.step:.3g}", f"{speed.idle:.1%}",
        ])  # fmt: skip
    return _table(header, rows, left=1)


def as_data(plan: Plan, limit: float) -> dict[str, Any]:
    """Return a plan as plain data: bytes, seconds and the names of this package."""
    return {
        "layout": {**dataclasses.asdict(plan.layout), "gpus": plan.layout.gpus, "batch": plan.layout.batch},
        "fits": plan.peak <= limit,
        "peak_bytes": plan.peak,
        "limit_bytes": int(limit),
        "stages": [
            {"stage": stage.stage, "blocks": stage.layers, "num_parameters": stage.num_parameters, **_terms(stage),
             "traffic": [_traffic_data(one) for one in sent]}
            for stage, sent in zip(plan.memory, plan.traffic, strict=True)
        ],
        "speed": dataclasses.asdict(plan.speed),
        "bubble_of_equal_stages": plan.bubble,
    }  # fmt: skip


def _traffic_data(one: Traffic) -> dict[str, Any]:
    return {**dataclasses.asdict(one), "sent": one.sent}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Return aligned lines; the first `left` columns are text."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
                         for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in (header, *rows)
    ]  # fmt: skip


def _wrapped(start: str, text: str) -> list[str]:
    """Return the lines of a text behind its first words, no longer than the page and indented alike."""
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


def _gib(number: int) -> str:
    return f"{number / GIBIBYTE:.2f}"


def _bytes(number: float) -> str:
    for size, word in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f} B"


def _count(number: float) -> str:
    for size, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"


def _value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
