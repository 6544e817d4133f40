"""What would need less memory: in order of cost, each by as much as the plan says, in YAML that a config takes."""

from __future__ import annotations

import pytest
import yaml

from megatron.config.load import load_config
from megatron.config.resolve import resolve
from megatron.planning.layout import Layout
from megatron.planning.plan import Planner
from megatron.planning.remedies import remedies
from megatron.planning.speed import GPUS, assume


def planned(config):
    planner = Planner(config, 50257, assume(GPUS["H100"], 7e9))
    return planner, planner.peak(Layout.of(config))


def load(world_size, *overrides):
    return load_config(["configs/pythia/6-9B.yml"], None, list(overrides), world_size=world_size, announce=False)


WHOLE = (
    "model_parallel_size=1",
    "zero_optimization.stage=0",
    "checkpoint_activations=false",
    "precision=bf16",
    "fp16=null",
)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(8, WHOLE), (1, (*WHOLE, "gradient_accumulation_steps=1")), (8, ("train_micro_batch_size_per_gpu=6",))],
)
def test_each_saves_what_it_says_when_it_is_written(world_size, overrides):
    config = load(world_size, *overrides)
    planner, before = planned(config)
    found = remedies(planner, Layout.of(config))
    assert len(found) > 4
    for remedy in found:
        changes = yaml.safe_load(remedy.yaml())
        flat = config.flat()
        zero = {**flat["zero_optimization"], **changes.pop("zero_optimization", {})}
        changed = resolve({**flat, **changes, "zero_optimization": zero}, world_size=world_size)
        assert changed.batch.train_batch_size == config.batch.train_batch_size
        assert before - planned(changed)[1] == remedy.saved > 0, remedy.name


def test_the_order_is_that_of_cost():
    names = [remedy.name for remedy in remedies(planned(load(8, *WHOLE))[0], Layout.of(load(8, *WHOLE)))]
    assert names == [
        "a micro-batch of 4", "a micro-batch of 1", "norms and activations computed twice", "moments in bf16", "ZeRO 1",
        "ZeRO 2", "ZeRO 3", "whole blocks computed twice", "optimizer states on the CPU", "activations on the CPU",
        "tensor parallelism",
    ]  # fmt: skip


def test_a_loss_that_is_not_fused_stands_behind_recomputation():
    config = load(8, *WHOLE, "cross_entropy_fusion=false")
    names = [remedy.name for remedy in remedies(planned(config)[0], Layout.of(config))]
    assert names.index("norms and activations computed twice") + 1 == names.index("a fused loss")
