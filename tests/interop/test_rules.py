"""Every rule there and back, and against the layout written out."""

from __future__ import annotations

import pytest
import torch

from megatron.interop.rules import Halves, SplitQKV, StackedQKV, Transposed, per_layer, same


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tail", [(5,), ()])
def test_query_key_value_by_name(kv_heads, tail):
    heads, dim = 4, 3
    group = heads // kv_heads
    fused = torch.randn((heads + 2 * kv_heads) * dim, *tail)
    rule = SplitQKV(("qkv",), ("q", "k", "v"), heads, kv_heads)
    query, key, value = rule.to_hf([fused])
    rows = fused.split(dim)
    for g in range(kv_heads):
        start = g * (group + 2)
        assert torch.equal(query.split(dim)[g * group], rows[start])
        assert torch.equal(query.split(dim)[g * group + group - 1], rows[start + group - 1])
        assert torch.equal(key.split(dim)[g], rows[start + group])
        assert torch.equal(value.split(dim)[g], rows[start + group + 1])
    assert torch.equal(rule.from_hf([query, key, value])[0], fused)


@pytest.mark.parametrize("transposed", [True, False])
def test_stacked_query_key_value(transposed):
    rule = StackedQKV(("qkv",), ("c_attn",), 4, 4, transposed)
    fused = torch.randn(36, 5)
    (stacked,) = rule.to_hf([fused])
    query, *_ = SplitQKV(("qkv",), ("q", "k", "v"), 4, 4).to_hf([fused])
    assert torch.equal((stacked.t() if transposed else stacked)[:12], query)
    assert torch.equal(rule.from_hf([stacked])[0], fused)


def test_halves_are_value_then_gate():
    both = torch.arange(12.0).reshape(6, 2)
    up, gate = Halves(("linear1",), ("up", "gate")).to_hf([both])
    assert torch.equal(up, both[:3])
    assert torch.equal(gate, both[3:])
    assert torch.equal(Halves(("linear1",), ("up", "gate")).from_hf([up, gate])[0], both)


def test_transposed():
    tensor = torch.randn(3, 4)
    rule = Transposed(("a",), ("b",))
    assert torch.equal(rule.to_hf([tensor])[0], tensor.t())
    assert torch.equal(rule.from_hf(rule.to_hf([tensor]))[0], tensor)


def test_layers_are_numbered():
    rules = per_layer([same("layers.{i}.x", "h.{i}.y")], 3)
    assert [(rule.ours, rule.theirs) for rule in rules] == [((f"layers.{i}.x",), (f"h.{i}.y",)) for i in range(3)]
