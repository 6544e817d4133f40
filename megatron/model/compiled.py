"""Blocks compiled by torch.compile, each by itself; all layers share one graph, which is compiled once.

Only what a block computes is compiled, and not the call of the module around it, so recomputation and hooks on the
block stay as they are. Under ZeRO 3 a block's weights are gathered around its compiled code (`engine/whole_blocks.py`).
A graph is whole (`fullgraph`): what cannot be traced is an error at the first step, and never a slow run.

Numbers are those of the eager blocks within rounding. Dropout draws other masks, from the same streams.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.model.block import Block
from megatron.model.cache import KVCache
from megatron.model.positions import ALONE, Span
from megatron.model.stream import Stream
from megatron.ops.compiled import mend_cpp_reductions

MOST_GRAPHS = 64
"""Graphs that blocks may have: for training and evaluation, for each shape of a batch, for blocks that differ."""


def blocks(model: nn.Module) -> list[Block]:
    """Return the decoder blocks of a model or of its stage."""
    return [module for module in model.modules() if isinstance(module, Block)]


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile every block of a model when it is first called; return how many there are.

    backend: torch.compile's; "aot_eager" traces and does not generate code, which takes seconds less.
    """
    compiler: Any = importlib.import_module("torch._dynamo")  # 0.7 s, so nobody else imports it
    compiler.config.disable = False  # the launcher switches it off for what others would compile
    found = blocks(model)
    if backend == "inductor" and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        mend_cpp_reductions()
    compiler.config.recompile_limit = max(compiler.config.recompile_limit, MOST_GRAPHS, 4 * len(found))
    for block in found:
        compiled = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
        block.forward = partial(_forward, block, compiled)
    return len(found)


def _forward(block: Block, compiled: Callable[..., Stream], stream: Stream, cache: KVCache | None = None) -> Stream:
    """Run a compiled block, after the tables that all layers share: made inside, they would be part of the first
    layer's graph in the first call only, and a recomputed layer would find another graph than it had."""
    attention, region = block.attention, block.region
    length = stream.hidden.shape[1] * (region.axis.size if region.splits_sequence else 1)
    span = Span.of(length, cache, ALONE if attention.across is None else attention.across.axis)
    if attention.rotary is not None:
        attention.rotary(span, stream.hidden.device)
    attention.mask.slopes_on(stream.hidden.device)
    return compiled(stream, cache)
