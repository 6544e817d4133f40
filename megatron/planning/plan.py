"""One layout of one config, planned: memory of each stage, traffic, and time.

plan = Planner(config, vocab_size=50304, assumptions=assume(GPUS["H100"], 1_400_000_000)).plan(Layout.of(config))
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema.config import Config
from megatron.model.accounting import mlp_shape, padded_vocab_size
from megatron.parallel.pipeline import bubble_fraction
from megatron.planning.communication import Traffic, traffic
from megatron.planning.layout import Layout
from megatron.planning.memory import RESERVE, StageMemory, stage_memory
from megatron.planning.speed import Assumptions, Speed, speed
from megatron.planning.stages import Stage, stages


@dataclass(frozen=True)
class Plan:
    """What one layout needs. memory and traffic: for a GPU of each pipeline stage."""

    layout: Layout
    memory: tuple[StageMemory, ...]
    traffic: tuple[tuple[Traffic, ...], ...]
    speed: Speed
    bubble: float

    @property
    def peak(self) -> int:
        """Bytes of the fullest GPU."""
        return max(stage.total for stage in self.memory)

    @property
    def fullest(self) -> StageMemory:
        """The memory of the fullest GPU."""
        return max(self.memory, key=lambda stage: stage.total)


class Planner:
    """Plans layouts of one model.

    vocab_size: token ids before padding, which depends on the tensor axis. reserve: bytes set aside on each GPU.
    """

    def __init__(self, config: Config, vocab_size: int, assumptions: Assumptions, reserve: float = RESERVE) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.assumptions = assumptions
        self.reserve = reserve
        self._stages: dict[tuple[int, int], list[Stage]] = {}

    def padded(self, layout: Layout) -> int:
        """Return the rows of the word embedding under a layout."""
        return padded_vocab_size(self.vocab_size, self.config.model.make_vocab_size_divisible_by, layout.tp)

    def stages(self, layout: Layout) -> list[Stage]:
        """Return the parts of the model on each pipeline stage."""
        key = layout.pp, layout.tp
        if key not in self._stages:
            self._stages[key] = stages(self.config, self.padded(layout), *key)
        return self._stages[key]

    def memory(self, layout: Layout) -> list[StageMemory]:
        """Return the bytes of a GPU of each stage."""
        return stage_memory(self.config, layout, self.stages(layout), self.padded(layout), self.reserve)

    def peak(self, layout: Layout) -> int:
        """Return the bytes of the fullest GPU."""
        return max(stage.total for stage in self.memory(layout))

    def plan(self, layout: Layout, simulate: bool = True) -> Plan:
        """Return memory, traffic and time; simulate: run the pipeline's schedule instead of estimating it."""
        parts, vocab_size = self.stages(layout), self.padded(layout)
        memory = self.memory(layout)
        sizes = [stage.num_parameters for stage in memory]
        sent = [tuple(traffic(self.config, layout, parts, index)) for index in range(len(parts))]
        moved = [one.travelling / min(layout.pp - one.stage, layout.accumulation) for one in memory]
        time = speed(self.config, layout, parts, sent, sizes, vocab_size, self.assumptions, simulate, moved)
        bubble = bubble_fraction(layout.pp, layout.accumulation)
        return Plan(layout, tuple(memory), tuple(sent), time, bubble)

    def is_possible(self, layout: Layout) -> bool:
        """Return whether the model can be cut this way, by the rules that a config is checked with."""
        model, tp = self.config.model, layout.tp
        rows, columns, gated = mlp_shape(model)
        cut = (model.num_attention_heads, model.num_kv_heads or tp, rows // (2 if gated else 1), columns)
        if any(size % tp for size in cut) or layout.pp > model.num_layers:
            return False
        if layout.cp > 1 and model.seq_length % (2 * layout.cp):
            return False
        if layout.sequence_parallel and (tp == 1 or model.seq_length % (tp * layout.cp)):
            return False
        shared = layout.cp if self.config.parallel.context_parallel_method == "all_to_all" else 1
        if (model.num_kv_heads or model.num_attention_heads) % (tp * shared):
            return False
        return not (layout.pp > 1 and layout.zero_stage >= 2)
