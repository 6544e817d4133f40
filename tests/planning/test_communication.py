"""Closed forms of what a step sends; those of the data axis are counted on real engines in test_memory.py."""

import pytest

from megatron.planning.communication import Traffic, data_traffic, traffic
from megatron.planning.layout import Layout
from megatron.planning.memory import stages
from tests.planning.small import VOCAB, config

E, H, T = 2, 32, 64  # bytes of an element, hidden size, tokens of a micro-batch


def _sent(layout, **keys):
    resolved = config(1, num_layers=4, **keys)
    parts = stages(resolved, VOCAB, layout.pp, layout.tp)
    return {
        index: {(one.axis, one.operation): one.payload for one in traffic(resolved, layout, parts, index, 1000, VOCAB)}
        for index in range(layout.pp)
    }


def test_rings_send_what_they_send():
    assert Traffic("data", "all-reduce", 4, 1000).sent == 1500
    assert Traffic("data", "all-gather", 4, 1000).sent == Traffic("data", "reduce-scatter", 4, 1000).sent == 750
    assert Traffic("pipeline", "send", 4, 1000).sent == 1000


def test_one_gpu_sends_nothing():
    assert _sent(Layout(micro_batch=2)) == {0: {}}


def test_zero_3_gathers_again_what_it_could_not_keep():
    resolved, layout = config(1), Layout(dp=2, zero_stage=3, accumulation=3)
    payload = {live: data_traffic(resolved, layout.changed(live=live), 1000)[1].payload for live in (0, 400, 5000)}
    assert payload == {0: 3 * 2 * 2000, 400: 3 * 2 * 1600, 5000: 3 * 2 * 1000}


def test_tensor_axis():
    message = E * H * T
    sent = _sent(Layout(tp=2, micro_batch=2, accumulation=3))[0]
    assert sent == {("tensor", "all-reduce"): 3 * (message * (4 * 4 + 2) + 12 * T)}
    again = _sent(Layout(tp=2, micro_batch=2, accumulation=3, recompute=1))[0]
    assert again["tensor", "all-reduce"] - sent["tensor", "all-reduce"] == 3 * message * 2 * 4
    spread = _sent(Layout(tp=2, micro_batch=2, accumulation=3, sequence_parallel=True))[0]
    assert spread == {
        ("tensor", "reduce-scatter"): 3 * message * (4 * 4 + 2),
        ("tensor", "all-gather"): 3 * message * (4 * 4 + 2 + 2 * 4),
        ("tensor", "all-reduce"): 3 * 12 * T,
    }


@pytest.mark.parametrize("spread", [1, 2])
def test_pipeline(spread):
    layout = Layout(pp=3, tp=spread, micro_batch=2, accumulation=5, sequence_parallel=spread > 1)
    sent = _sent(layout)
    assert [sent[stage]["pipeline", "send"] for stage in range(3)] == [5 * n * E * H * T // spread for n in (1, 2, 1)]
    tied = _sent(layout, no_weight_tying=False)
    assert [tied[stage].get(("pipeline", "all-reduce"), 0) * spread for stage in range(3)] == [
        4 * VOCAB * H, 0, 4 * VOCAB * H
    ]  # fmt: skip


def test_context():
    sent = _sent(Layout(cp=4, micro_batch=2, accumulation=3))[0]
    pair = 2 * E * H * T // 4
    assert sent["context", "send"] == 3 * 4 * pair * (3 + 3 + 4)
