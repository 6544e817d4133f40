"""The schedule against the closed form, and against what a pipeline can do at best."""

import random

import pytest

from megatron.parallel.pipeline import bubble_fraction
from megatron.planning.schedule import estimate, order, step_time


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 32])
def test_equal_stages_idle_by_the_closed_form(stages, micro_batches):
    for forward, backward in ((1.0, 2.0), (1.0, 3.0), (5.0, 1.0)):
        times = [forward] * stages, [backward] * stages
        idle = 1 - micro_batches * (forward + backward) / step_time(*times, micro_batches)
        assert idle == pytest.approx(bubble_fraction(stages, micro_batches), abs=1e-12)
        assert estimate(*times, micro_batches) == pytest.approx(step_time(*times, micro_batches))
    assert bubble_fraction(stages, micro_batches) == (stages - 1) / (micro_batches + stages - 1)


def test_an_uneven_pipeline_by_hand():
    # Stage 0: F0 0-1, F1 1-2, waits for B0 of stage 1 (ends 1+2+2=5): B0 5-6, B1. Stage 1: F0 1-3, B0 3-5, F1 5-7,
    # B1 7-9; then stage 0 runs B1 9-10.
    assert step_time([1, 2], [1, 2], 2) == 10


def test_every_stage_runs_every_pass_once_and_holds_no_more_than_its_depth():
    for stages, micro_batches in ((4, 8), (4, 2), (1, 3), (5, 5)):
        for stage in range(stages):
            passes = order(stage, stages, micro_batches)
            assert sorted(passes) == sorted((k, i) for k in ("forward", "backward") for i in range(micro_batches))
            held = peak = 0
            for kind, _ in passes:
                held += 1 if kind == "forward" else -1
                peak = max(peak, held)
            assert peak == min(stages - stage, micro_batches)


def test_uneven_stages_take_at_least_the_work_of_the_slowest():
    generator = random.Random(5)
    for _ in range(50):
        stages, micro_batches = generator.randint(2, 6), generator.randint(1, 12)
        forward = [generator.uniform(0.8, 1.2) for _ in range(stages)]
        backward = [2 * one for one in forward]
        simulated = step_time(forward, backward, micro_batches)
        slowest = micro_batches * 3 * max(forward)
        assert max(slowest, 3 * sum(forward)) <= simulated + 1e-9
        assert simulated == pytest.approx(estimate(forward, backward, micro_batches), rel=0.1)
