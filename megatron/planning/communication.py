"""Bytes that one optimizer step sends over each axis, in closed form.

`payload` is what is handed to the collectives: the whole tensor of an all-reduce, all-gather or reduce-scatter, and the
message of a send. `sent` is what then leaves each GPU, with rings over the n GPUs of the axis:

    all-reduce 2 (n-1)/n,   all-gather, reduce-scatter and all-to-all (n-1)/n,   send 1

With P parameters on a GPU (w bytes each, gradients in 4), A micro-batches, L blocks on the stage, T tokens of a
micro-batch on a GPU, M = w T h and, for each block, 2 places where tensor-parallel ranks meet (1 with the parallel
residual and without dropout):

    data      ZeRO 0   all-reduce 4 P
              ZeRO 1   all-reduce 4 P          all-gather w P
              ZeRO 2   all-reduce 4 P A        all-gather w P
              ZeRO 3   reduce-scatter 4 P A    all-gather w A (2 P - what stays gathered in between)
    tensor    A M (4 L + 2) all-reduced, or (2 L + 2); under sequence_parallel each all-reduce is an all-gather and a
              reduce-scatter. Blocks that are recomputed do the forward part again, but for the last sum; norms that
              are, their all-gathers. 12 A T of the loss, and partial gradients in fp32: once a step, under ZeRO 2 and
              3 once a micro-batch
    pipeline  A M (/ tp under sequence_parallel) each way over each boundary; what stages share is all-reduced in fp32
    context   ring: per block and micro-batch (cp - 1) T tokens of keys and values forward, as many backward, and their
              gradients in fp32; within a window only what is seen. all_to_all: queries, keys, values and results each
              way. Blocks whose attention is recomputed do the forward part again
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema.config import Config
from megatron.model.accounting import layer_types
from megatron.parallel.visible import tokens_sent
from megatron.planning.activations import boundary_bytes, tokens
from megatron.planning.layout import WEIGHT_BYTES, Layout
from megatron.planning.stages import Stage

_FACTOR = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}


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


def traffic(config: Config, layout: Layout, parts: list[Stage], index: int) -> list[Traffic]:
    """Return what a GPU of pipeline stage `index` sends in one step; `parts` are the stages."""
    stage = parts[index]
    found = [
        *data_traffic(config, layout, stage.num_parameters, stage.num_persistent(layout.persistence)),
        *_shared_traffic(layout, stage),
        *tensor_traffic(config, layout, stage),
        *pipeline_traffic(config, layout, index),
        *context_traffic(config, layout, stage),
    ]
    return [one for one in found if one.size > 1 and one.payload]


def data_traffic(config: Config, layout: Layout, numel: int, persistent: int = 0) -> list[Traffic]:
    """Return the traffic of gradients and, under ZeRO, weights over the replicas.

    numel: parameters on the GPU. persistent: of these, in tensors that ZeRO 3 gathers once, after the update."""
    size, weight = layout.replicas, WEIGHT_BYTES[config.numerics.weight_precision]
    gradient = numel * WEIGHT_BYTES[config.deepspeed.communication_data_type or "fp32"]
    passes = layout.accumulation
    if layout.zero_stage == 0:
        return [Traffic("data", "all-reduce", size, 4 * numel)]
    if layout.zero_stage == 3:
        sharded = numel - persistent
        gathered = (2 * sharded - min(sharded, layout.live)) * passes + persistent
        return [
            Traffic("data", "reduce-scatter", size, gradient * passes, hidden=layout.overlap),
            Traffic("data", "all-gather", size, weight * gathered, hidden=True),
        ]
    times = passes if layout.zero_stage == 2 else 1
    return [
        Traffic("data", "all-reduce", size, gradient * times, hidden=layout.overlap),
        Traffic("data", "all-gather", size, weight * numel),
    ]


def _shared_traffic(layout: Layout, stage: Stage) -> list[Traffic]:
    """Return the sums of gradients of what several stages hold: over them, and before over three or more replicas."""
    numel = {holders: 0 for _, holders in stage.shared}
    for parameter, holders in stage.shared:
        numel[holders] += parameter.numel(layout.tp)
    between = [Traffic("pipeline", "all-reduce", holders, 4 * count) for holders, count in numel.items()]
    alike = 4 * sum(numel.values()) if layout.replicas > 2 else 0
    return [*between, Traffic("data", "all-reduce", layout.replicas, alike)]


def tensor_traffic(config: Config, layout: Layout, stage: Stage) -> list[Traffic]:
    """Return the traffic of split layers, of the loss over them, and of gradients that are partial."""
    element = WEIGHT_BYTES[config.numerics.weight_precision]
    summed = 4 if config.parallel.fp32_allreduce else element
    count = layout.accumulation * tokens(config, layout)
    message = count * config.model.hidden_size
    ends = stage.has_embedding + stage.has_head
    sums = sum(_meetings(config)) * len(stage.blocks) + ends
    sums_again, gathers_again = _again(config, layout, stage)
    numbers = 12 * count if stage.has_head else 0
    numbers += _head_norms(config, layout, stage) * count
    numbers += 4 * stage.num_partial(layout.sequence_parallel) * (layout.accumulation if layout.zero_stage > 1 else 1)
    if not layout.sequence_parallel:
        return [Traffic("tensor", "all-reduce", layout.tp, message * summed * (sums + sums_again) + numbers)]
    return [
        Traffic("tensor", "all-gather", layout.tp, message * element * (sums + gathers_again)),
        Traffic("tensor", "reduce-scatter", layout.tp, message * summed * (sums + sums_again)),
        Traffic("tensor", "all-reduce", layout.tp, numbers),
    ]


def _meetings(config: Config) -> tuple[int, int]:
    """Return how often a block enters the split layers, and how often it leaves them."""
    if not config.model.gpt_j_residual:
        return 2, 2
    return 1, 2 if config.numerics.hidden_dropout else 1


def _again(config: Config, layout: Layout, stage: Stage) -> tuple[int, int]:
    """Return (sums, gathers) that recomputation repeats; the last sum of a chunk is needed for dropout only."""
    whole = [layer for layer in stage.blocks if layout.recompute and layout.recomputes(layer)]
    enters, leaves = _meetings(config)
    chunks = -(-len(whole) // max(1, layout.recompute))
    last = 0 if config.numerics.hidden_dropout else chunks
    normed = [layer for layer in stage.blocks if "norm" in layout.operations and layout.recomputes(layer)]
    gathers = 0 if config.model.gpt_j_residual else enters * len(normed)  # with it norms follow what is gathered
    return leaves * len(whole) - last, enters * len(whole) + gathers


def _head_norms(config: Config, layout: Layout, stage: Stage) -> int:
    """Return bytes per token of the statistics that norms over all heads share: two means of queries and of keys."""
    model = config.model
    if not model.use_qk_layernorm or model.norm not in ("layernorm", "non_parametric_layernorm"):
        return 0
    again = sum(layout.recomputes(layer) for layer in stage.blocks) if layout.recompute else 0
    return 16 * (2 * len(stage.blocks) + again)


def pipeline_traffic(config: Config, layout: Layout, index: int) -> list[Traffic]:
    """Return the messages that stage `index` sends: forward to the next, gradients to the one before."""
    neighbours = (index > 0) + (index < layout.pp - 1)
    return [Traffic("pipeline", "send", layout.pp, neighbours * layout.accumulation * boundary_bytes(config, layout))]


def context_traffic(config: Config, layout: Layout, stage: Stage) -> list[Traffic]:
    """Return what attention sends for the busiest GPU of the context axis."""
    if layout.cp == 1:
        return []
    exchanges = config.parallel.context_parallel_method == "all_to_all"
    one = _exchanged if exchanges else _rung
    payload = layout.accumulation * sum(one(config, layout, layer) for layer in stage.blocks)
    return [Traffic("context", "all-to-all" if exchanges else "send", layout.cp, payload)]


def _token_elements(config: Config, layout: Layout) -> tuple[int, int]:
    """Return (elements of a token's query, elements of its key) on one GPU."""
    model = config.model
    heads = model.num_attention_heads
    groups = heads if model.use_qk_layernorm else model.num_kv_heads or heads
    width = model.hidden_size // heads
    return heads * width // layout.tp, groups * width // layout.tp


def _forwards(layout: Layout, layer: int) -> int:
    """Return how often a block's attention runs forwards in a micro-batch."""
    return 2 if layout.recomputes(layer) and (layout.recompute or "attention" in layout.operations) else 1


def _rung(config: Config, layout: Layout, layer: int) -> int:
    model, element = config.model, WEIGHT_BYTES[config.numerics.weight_precision]
    types = layer_types(model)
    window = model.sliding_window_width if "local" not in types or types[layer] == "local" else None
    half = model.seq_length // (2 * layout.cp)
    pair = 2 * layout.micro_batch * _token_elements(config, layout)[1]
    sent = (tokens_sent(rank, layout.cp, half, window) for rank in range(layout.cp))
    return pair * max(keys * element * (_forwards(layout, layer) + 1) + gradients * 4 for keys, gradients in sent)


def _exchanged(config: Config, layout: Layout, layer: int) -> int:
    query, key = _token_elements(config, layout)
    each_way = tokens(config, layout) * (2 * query + 2 * key) * WEIGHT_BYTES[config.numerics.weight_precision]
    return each_way * (_forwards(layout, layer) + 1)
