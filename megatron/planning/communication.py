"""Bytes that one optimizer step sends over each axis, in closed form.

`payload` is what is handed to the collectives: the whole tensor of an all-reduce, all-gather or reduce-scatter, and the
message of a send. `sent` is what then leaves each GPU, with rings over the n GPUs of the axis:

    all-reduce 2 (n-1)/n,   all-gather and reduce-scatter (n-1)/n,   send 1

With P parameters on a GPU (w bytes each, gradients in 4), A micro-batches, L blocks on the stage and a message of
M = e b s h / cp bytes:

    data      ZeRO 0   all-reduce 4 P
              ZeRO 1   all-reduce 4 P          all-gather w P
              ZeRO 2   all-reduce 4 P A        all-gather w P
              ZeRO 3   reduce-scatter 4 P A    all-gather w A (2 P - what stays gathered in between)
    tensor    A M (4 L + 2) all-reduced, A M 2 L more where blocks are recomputed; under sequence_parallel each
              all-reduce is an all-gather and a reduce-scatter, and 2 A M L more are gathered for the weights' gradients
    pipeline  A M (/ tp under sequence_parallel) each way over each boundary; a tied table all-reduces 4 v h / tp
    context   A L (cp - 1) keys and values forward, the same again and their gradients backward
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema.config import Config
from megatron.planning.activations import boundary_bytes, tokens
from megatron.planning.layout import WEIGHT_BYTES, Layout
from megatron.planning.memory import Stage

_FACTOR = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over one axis in one optimizer step of one GPU.

    axis: data, tensor, pipeline or context. size: GPUs on it. payload: bytes of all such collectives together.
    hidden: it runs beside the computation and costs time only where it takes longer.
    """

    axis: str
    operation: str
    size: int
    payload: int
    hidden: bool = False

    @property
    def sent(self) -> float:
        """Bytes that leave the GPU."""
        if self.operation == "send":
            return float(self.payload)
        return _FACTOR[self.operation] * (self.size - 1) / self.size * self.payload


def traffic(
    config: Config, layout: Layout, parts: list[Stage], index: int, numel: int, vocab_size: int
) -> list[Traffic]:
    """Return what a GPU of pipeline stage `index` sends in one step.

    parts: the stages; numel: parameters on this GPU; vocab_size: rows of the word embedding, padding included."""
    found = [
        *data_traffic(config, layout, numel),
        *tensor_traffic(config, layout, parts[index]),
        *pipeline_traffic(config, layout, index, vocab_size),
        *context_traffic(config, layout, len(parts[index].blocks)),
    ]
    return [one for one in found if one.size > 1 and one.payload]


def data_traffic(config: Config, layout: Layout, numel: int) -> list[Traffic]:
    """Return the traffic of gradients and, under ZeRO, weights over the data axis (context included)."""
    size, weight = layout.dp * layout.cp, WEIGHT_BYTES[config.numerics.precision]
    gradient = numel * WEIGHT_BYTES[config.deepspeed.communication_data_type or "fp32"]
    passes = layout.accumulation
    if layout.zero_stage == 0:
        return [Traffic("data", "all-reduce", size, 4 * numel)]
    if layout.zero_stage == 3:
        gathered = 2 * numel - min(numel, layout.live)
        return [
            Traffic("data", "reduce-scatter", size, gradient * passes, hidden=layout.overlap),
            Traffic("data", "all-gather", size, weight * gathered * passes, hidden=True),
        ]
    times = passes if layout.zero_stage == 2 else 1
    return [
        Traffic("data", "all-reduce", size, gradient * times, hidden=layout.overlap),
        Traffic("data", "all-gather", size, weight * numel),
    ]


def tensor_traffic(config: Config, layout: Layout, stage: Stage) -> list[Traffic]:
    """Return the traffic of split layers: two messages a block forward and two backward, one at each end."""
    message = tokens(config, layout) * config.model.hidden_size * WEIGHT_BYTES[config.numerics.precision]
    passes = 4 + (2 if layout.recompute else 0)
    ends = sum(part.kind in ("embedding", "head") for part in stage.parts)
    payload = layout.accumulation * message * (passes * len(stage.blocks) + ends)
    losses = layout.accumulation * tokens(config, layout) * 12 if stage.has_head else 0
    if not layout.sequence_parallel:
        return [Traffic("tensor", "all-reduce", layout.tp, payload + losses)]
    again = layout.accumulation * message * 2 * len(stage.blocks)
    return [
        Traffic("tensor", "all-gather", layout.tp, payload + again),
        Traffic("tensor", "reduce-scatter", layout.tp, payload),
        Traffic("tensor", "all-reduce", layout.tp, losses),
    ]


def pipeline_traffic(config: Config, layout: Layout, index: int, vocab_size: int) -> list[Traffic]:
    """Return the messages that stage `index` sends: forward to the next, gradients to the one before."""
    neighbours = (index > 0) + (index < layout.pp - 1)
    found = [Traffic("pipeline", "send", layout.pp, neighbours * layout.accumulation * boundary_bytes(config, layout))]
    if not config.model.no_weight_tying and index in (0, layout.pp - 1) and layout.pp > 1:
        table = 4 * vocab_size * config.model.hidden_size // layout.tp
        found.append(Traffic("pipeline", "all-reduce", 2, table))
    return found


def context_traffic(config: Config, layout: Layout, num_blocks: int) -> list[Traffic]:
    """Return the messages of ring attention: keys and values go round in both passes, their gradients in the second."""
    model = config.model
    heads = model.num_kv_heads or model.num_attention_heads
    width = model.hidden_size // model.num_attention_heads
    pair = 2 * tokens(config, layout) * heads * width // layout.tp * WEIGHT_BYTES[config.numerics.precision]
    forward = (layout.cp - 1) * pair
    backward = forward + layout.cp * pair
    again = forward if layout.recompute else 0
    payload = layout.accumulation * num_blocks * (forward + backward + again)
    return [Traffic("context", "send", layout.cp, payload)]
