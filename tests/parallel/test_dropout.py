"""Dropout under tensor parallelism and recomputation.

Replicated regions draw the same mask on all tensor-parallel ranks, sharded regions (attention probabilities, tokens
under sequence parallelism) different ones; recomputation draws what the first pass drew; nothing depends on the past.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.engine.build import build_engine
from megatron.model.attention import SelfAttention
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.ops.attention import attention
from megatron.parallel import collectives
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from tests.parallel.matrix import (
    Trace,
    make_batches,
    make_config,
    make_mesh,
    micro_batches,
    run_layout,
)
from tests.ranks import run_ranks

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.3}
TP: dict[str, Any] = {"model_parallel_size": 2}
SP: dict[str, Any] = {**TP, "sequence_parallel": True}


def state() -> str:
    """Return what decides the next draw."""
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


def recorded_draws(flat: dict[str, Any], iteration: int) -> list[tuple[str, str]]:
    """Do one step, and return the generator's state at each dropout: (where, state), in order."""
    config = make_config({**DROPOUT, **flat}, 2)
    mesh = make_mesh(config)
    model = build_model(config, 48, mesh)
    engine = build_engine(config, mesh, model, build_objective())
    record: list[tuple[str, str]] = []
    drop = collectives.F.dropout

    def recording_attention(*args: Any, **kwargs: Any) -> Tensor:
        record.append(("attention", state()))
        return attention(*args, **kwargs)

    def recording_dropout(hidden: Tensor, probability: float) -> Tensor:
        record.append(("hidden", state()))
        return drop(hidden, probability)

    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = recording_attention
    collectives.F.dropout = recording_dropout
    engine.train_step(micro_batches(config, make_batches(config)[iteration], mesh), iteration)
    return record


def by_place(draws: list[tuple[str, str]], place: str) -> list[str]:
    return [drawn for where, drawn in draws if where == place]


@pytest.mark.parametrize("flat", [TP, {**TP, "gpt_j_residual": True}, SP, {**SP, "gpt_j_residual": True}])
def test_ranks_draw_alike_where_they_hold_the_same(flat: dict[str, Any]) -> None:
    first, second = run_ranks(2, recorded_draws, flat, 0)
    assert [where for where, _ in first] == [where for where, _ in second]
    assert len(by_place(first, "attention")) == 2
    assert len(by_place(first, "hidden")) == 5  # after the embedding, and two in each block
    assert not set(by_place(first, "attention")) & set(by_place(second, "attention"))
    if flat.get("sequence_parallel"):
        assert not set(by_place(first, "hidden")) & set(by_place(second, "hidden"))
    else:
        assert by_place(first, "hidden") == by_place(second, "hidden")
    assert len(set(first)) == len(first)  # and each place draws something else


@pytest.mark.parametrize("flat", [TP, SP])
def test_recomputation_draws_what_the_first_pass_drew(flat: dict[str, Any]) -> None:
    plain = run_ranks(2, recorded_draws, flat, 0)
    recomputed = run_ranks(2, recorded_draws, {**flat, "checkpoint_activations": True}, 0)
    for once, twice in zip(plain, recomputed, strict=True):
        assert twice[: len(once)] == once  # the first pass
        assert sorted(twice[len(once) :]) == sorted(once[1:])  # the blocks again, from the last one; not the embedding


@pytest.mark.parametrize("flat", [TP, SP, {**SP, "gpt_j_residual": True}])
def test_recomputed_gradients_are_the_same_bits(flat: dict[str, Any]) -> None:
    def gradients(**more: Any) -> Trace:
        return run_layout({**DROPOUT, **flat, **more}, 2)

    plain, recomputed = gradients(), gradients(checkpoint_activations=True, checkpoint_num_layers=2)
    assert plain.losses == recomputed.losses
    for ours, theirs in zip(plain.gradients, recomputed.gradients, strict=True):
        for name, gradient in theirs.items():
            assert torch.equal(ours[name], gradient), name


def test_draws_depend_on_the_iteration_and_on_nothing_before() -> None:
    (early, _), (late, _) = (run_ranks(2, recorded_draws, SP, iteration) for iteration in (0, 3))
    assert not set(early) & set(late)
    assert run_ranks(2, recorded_draws, SP, 3)[0] == late


def fork_inside_the_shared_stream() -> tuple[Tensor, Tensor, Tensor]:
    mesh = Mesh.create(tp=2)
    region, streams = TensorRegion(mesh.tp), RngStreams(7, mesh)
    streams.start_micro_batch(3, 1)
    before = torch.rand(4)
    with region.own_stream(mesh.device):
        own = torch.rand(4)
        torch.rand(mesh.tp.rank + 1)  # however much a rank draws inside
    return before, own, torch.rand(4)


def test_a_fork_leaves_the_shared_stream_alone() -> None:
    (before, own, after), (before2, own2, after2) = run_ranks(2, fork_inside_the_shared_stream)
    assert torch.equal(before, before2)
    assert torch.equal(after, after2)
    assert not torch.equal(own, own2)


def test_one_process_has_nothing_to_fork() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with TensorRegion(Mesh.single().tp).own_stream(torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)
