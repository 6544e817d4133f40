"""Attention by the package flash-attn, version 2 (`flash_attn`) or 3 (`flash_attn_interface`), where it is installed.

Both take [b, s, n, d], count a window's tokens without the query's own, align queries with the last keys, and take
documents as one long sequence with the places where they begin (`cu_seqlens`). How many documents a batch has is known
on the device only, so the first layer of each micro-batch waits for it; the others use what that one found. Compiled
blocks cannot wait, and leave documents to the next back end.

A package is imported by the first call, which is the probe's: what is traced later finds it in a table.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron.ops.attention_backend import Backend, sixteen_bits, without
from megatron.ops.sight import Sight

_PACKAGES: dict[str, ModuleType] = {}


def _package(name: str) -> ModuleType:
    if name not in _PACKAGES:
        _PACKAGES[name] = importlib.import_module(name)
    return _PACKAGES[name]


def _lacks(query: Tensor, key: Tensor, sight: Sight, dropout: float, also: frozenset[str] = frozenset()) -> str:
    reason = sixteen_bits(query) or without(sight, key.shape[2], dropout, also | {"window", "segments"})
    if not reason and sight.slopes is not None and not sight.causal:
        return "counts alibi's distances without their sign where tokens see those after them"
    if not reason and sight.segments is not None and query.shape[2] != key.shape[2]:
        return "has documents only where every token is a query"
    if not reason and sight.segments is not None and torch.compiler.is_compiling():
        return "waits for the number of documents, which a compiled block cannot"
    return reason


def _compute2(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float) -> Tensor:
    slopes = None if sight.slopes is None else sight.slopes.to(query.device, torch.float32)
    return _call(_package("flash_attn"), query, key, value, sight, dropout_p=dropout, alibi_slopes=slopes)


def _compute3(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float) -> Tensor:
    return _call(_package("flash_attn_interface"), query, key, value, sight)


def _call(module: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight, **settings: Any) -> Tensor:
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    window = (sight.window, 0) if sight.window is not None and sight.is_windowed(num_keys) else (-1, -1)
    settings |= {
        "softmax_scale": sight.scale,
        "causal": sight.causal,
        "window_size": window,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    tokens = [heads.transpose(1, 2) for heads in (query, key, value)]
    if sight.segments is None:
        output = module.flash_attn_func(*tokens, **settings)
    else:
        starts = sight.document_starts()
        ends = (starts, starts, num_keys, num_keys)  # the longest document is no longer than a row
        output = module.flash_attn_varlen_func(*(each.flatten(0, 1) for each in tokens), *ends, **settings)
    if isinstance(output, tuple):  # version 3 gave the log-sum-exps too, once
        output = output[0]
    result: Tensor = output.view(batch, num_queries, *query.shape[1::2]).transpose(1, 2)
    return result


FLASH2 = Backend("flash2", _compute2, partial(_lacks, also=frozenset({"slopes", "dropout"})))
FLASH3 = Backend("flash3", _compute3, _lacks)
