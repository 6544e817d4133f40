"""What to change where a run does not fit into memory: the cheapest first, each with what it saves by the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.planning.layout import Layout
from megatron.planning.memory import is_adam
from megatron.planning.plan import Planner
from megatron.planning.search import CHEAP, Fields, combine


@dataclass(frozen=True)
class Remedy:
    """One change. saved: bytes of the fullest GPU. settings: keys to write, dotted for entries of a block."""

    name: str
    settings: dict[str, Any]
    saved: int

    def yaml(self) -> str:
        """Return the lines to write into a config, blocks in one line each."""
        blocks: dict[str, Any] = {}
        for key, value in self.settings.items():
            *parents, last = key.split(".")
            block = blocks
            for parent in parents:
                block = block.setdefault(parent, {})
            block[last] = value
        return "\n".join(f"{key}: {_text(value)}" for key, value in blocks.items())


def remedies(planner: Planner, layout: Layout) -> list[Remedy]:
    """Return the changes of one kind each that need less memory with the same GPUs and global batch.

    In order of what they cost: a smaller micro-batch, recomputation of norms and activations, a fused loss, moments in
    bf16, ZeRO by stage, recomputation of whole blocks, states and activations on the CPU, tensor parallelism."""
    before, found = planner.peak(layout), []
    for name, fields, more in _changes(planner, layout):
        changed = combine(layout, [fields])
        if changed is None or changed == layout or not planner.is_possible(changed):
            continue
        saved = before - planner.peak(changed)
        if saved > before // 500:
            found.append(Remedy(name, {**changed.settings(layout), **more}, saved))
    return _with_loss(planner, layout, found)


def _changes(planner: Planner, layout: Layout) -> Iterator[tuple[str, Fields, dict[str, Any]]]:
    """Yield (name, fields, further keys) in order."""
    alone: dict[str, Any] = {}
    own = layout.micro_batch * layout.accumulation
    smaller = [size for size in range(layout.micro_batch // 2, 0, -1) if own % size == 0 and not layout.at_once]
    for size in dict.fromkeys([*smaller[:1], *smaller[-1:]]):
        yield f"a micro-batch of {size}", {"micro_batch": size}, alone
    if not layout.recompute and not layout.operations:
        yield "norms and activations computed twice", {"operations": CHEAP, "first": None}, alone
    if is_adam(planner.config) and layout.moment_bytes == 4 and not layout.offload:
        yield "moments in bf16", {"moment_bytes": 2}, alone
    is_single = layout.zero_stage == 0 and layout.accumulation == 1 and planner.config.numerics.precision != "fp16"
    if is_single and not layout.at_once:
        clipping = {"gradient_clipping": 0} if planner.config.optimizer.gradient_clipping else alone
        yield "updates in the backward pass", {"at_once": True}, clipping
    for stage in range(layout.zero_stage + 1, 4) if layout.replicas > 1 and not layout.at_once else ():
        yield f"ZeRO {stage}", {"zero_stage": stage}, alone
    if not layout.recompute:
        yield "whole blocks computed twice", {"recompute": 1, "operations": (), "first": None}, alone
    if not layout.offload and not layout.at_once:
        stage = max(1, layout.zero_stage)
        yield "optimizer states on the CPU", {"offload": True, "zero_stage": stage}, alone
    if not layout.travels:
        yield "activations on the CPU", {"travels": True}, alone
    if layout.dp % 2 == 0:
        yield "tensor parallelism", {"tp": 2 * layout.tp}, alone
    if layout.tp > 1 and not layout.sequence_parallel:
        yield "sequence parallelism", {"sequence_parallel": True}, alone


def _with_loss(planner: Planner, layout: Layout, found: list[Remedy]) -> list[Remedy]:
    """Return the changes with a fused loss in its place, where the config asks for none."""
    kernels = planner.config.kernels
    if kernels.cross_entropy_fusion is not False:
        return found
    fused = planner.config.model_copy(update={"kernels": kernels.model_copy(update={"cross_entropy_fusion": "auto"})})
    other = Planner(fused, planner.vocab_size, planner.assumptions, planner.reserve)
    saved = planner.peak(layout) - other.peak(layout)
    place = sum(remedy.name.startswith(("a micro", "norms")) for remedy in found)
    remedy = Remedy("a fused loss", {"cross_entropy_fusion": "auto"}, saved)
    return [*found[:place], *([remedy] if saved > 0 else []), *found[place:]]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
