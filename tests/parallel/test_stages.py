"""Which layers a stage gets, what it builds, and how long the schedule waits."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from megatron.errors import ConfigError
from megatron.model.build import build_plans
from megatron.model.sequential import SequentialModel
from megatron.model.stage import StageModel, StagePlan
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import balanced_bounds, bubble_fraction
from tests.parallel.matrix import VOCAB, make_config


def test_bounds_are_those_of_the_best_split():
    rng = random.Random(3)
    for _ in range(300):
        count, stages = rng.randint(1, 9), rng.randint(1, 4)
        weights = [rng.choice([0, 1, 2, 5, 7]) for _ in range(count)]
        blocks = [rng.random() < 0.7 for _ in range(count)]
        if sum(blocks) < stages:
            with pytest.raises(ConfigError, match=f"pipe_parallel_size = {stages}"):
                balanced_bounds(weights, stages, blocks)
            continue
        splits = [[0, *inner, count] for inner in itertools.combinations(range(1, count), stages - 1)]
        valid = [bounds for bounds in splits if all(any(blocks[a:b]) for a, b in itertools.pairwise(bounds))]
        bounds = balanced_bounds(weights, stages, blocks)
        assert bounds in valid
        assert cost(weights, bounds) == min(cost(weights, other) for other in valid)


def cost(weights: list[int], bounds: list[int]) -> tuple[int, int]:
    stages = [sum(weights[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return max(stages), sum(weight**2 for weight in stages)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (2, 4), (4, 2), (4, 16), (8, 8)])
def test_the_bubble_is_what_the_schedule_leaves_idle(stages, micro_batches):
    """A forward pass takes 1, a backward pass 2; each waits for what it needs of its neighbours."""
    queues = [
        [command for step in TrainSchedule(micro_batches, stages, stage).steps() for command in step]
        for stage in range(stages)
    ]
    passes = [[c for c in queue if isinstance(c, ForwardPass | BackwardPass)] for queue in queues]
    done: dict[tuple[int, str, int], float] = {}
    clocks, counts = [0.0] * stages, [[0, 0] for _ in range(stages)]
    positions = [0] * stages
    while any(position < len(queue) for position, queue in zip(positions, passes, strict=True)):
        for stage in range(stages):
            while positions[stage] < len(passes[stage]):
                is_backward = isinstance(passes[stage][positions[stage]], BackwardPass)
                number = counts[stage][is_backward]
                neighbour = stage + 1 if is_backward else stage - 1
                needed = (neighbour, "b" if is_backward else "f", number)
                if 0 <= neighbour < stages and needed not in done:
                    break
                clocks[stage] = max(clocks[stage], done.get(needed, 0.0)) + (2 if is_backward else 1)
                done[stage, needed[1], number] = clocks[stage]
                counts[stage][is_backward] += 1
                positions[stage] += 1
    idle = 1 - 3 * micro_batches / max(clocks)
    assert idle == pytest.approx(bubble_fraction(stages, micro_batches))


MODELS = [
    {"num_layers": 5},
    {"num_layers": 5, "no_weight_tying": False, "pos_emb": "learned", "hidden_dropout": 0.1},
    {"num_layers": 5, "pos_emb": "rpe"},
]


@pytest.mark.parametrize("keys", MODELS)
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stages_have_the_names_and_weights_of_the_whole(keys, stages):
    config, mesh = make_config(keys), Mesh.single()
    plans = build_plans(config, VOCAB, mesh)
    whole = dict(SequentialModel(plans, "cpu", torch.float32, seed=5).named_parameters())
    split = StagePlan.of(build_plans(config, VOCAB, mesh), stages, "parameters")
    assert {name: tuple(weight.shape) for name, weight in whole.items()} == split.shapes
    found: dict[str, list[int]] = {}
    for stage in range(stages):
        model = StageModel(build_plans(config, VOCAB, mesh), split, stage, "cpu", torch.float32, seed=5)
        assert {name for name, _ in model.named_parameters()} == split.held(stage)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, whole[name])
            found.setdefault(name, []).append(stage)
    assert found.keys() == whole.keys()
    assert {name: held for name, held in found.items() if len(held) > 1} == split.shared()
    assert sum(split.sizes()) == sum(whole[name].numel() * len(held) for name, held in found.items())


def test_methods_of_sharing_out():
    config = make_config({"num_layers": 6, "hidden_size": 32})
    plans = build_plans(config, 4000, Mesh.single())  # word embedding, 6 blocks, norm, head

    def bounds(method: str) -> tuple[int, ...]:
        return StagePlan.of(plans, 3, method).bounds

    assert bounds("uniform") == (0, 3, 6, 9)
    assert bounds("type:transformer|mlp") == bounds("type:PreNormBlock") == (0, 3, 5, 9)
    assert bounds("parameters") == (0, 2, 6, 9)  # the embedding and the head weigh as much as ten blocks each
    with pytest.raises(ConfigError, match="no layer is called that; there are: embedding"):
        bounds("type:mamba")
