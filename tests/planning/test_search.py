"""Changes and rankings: each keeps the run the same, fits, and is what it is said to be."""

import pytest

from megatron.config.load import load_config
from megatron.planning.layout import Layout
from megatron.planning.memory import GIBIBYTE
from megatron.planning.plan import Planner
from megatron.planning.search import changes, search
from megatron.planning.speed import GPUS, assume, interpolate


def _planner(config, gpu="A100-40", mfu=None):
    return Planner(config, 50257, assume(GPUS[gpu], 20e9, mfu))


def test_fp8_is_as_much_faster_as_was_published_and_keeps_fewer_bytes():
    fp8, bf16 = (
        load_config(
            ["configs/6-7B.yml"],
            None,
            [f"precision={kind}", "fp16=null", "checkpoint_activations=false"],
            8,
            announce=False,
        )
        for kind in ("fp8", "bf16")
    )
    plans = [Planner(config, 50257, assume(GPUS["H200"], 6.7e9)).plan(Layout.of(config)) for config in (fp8, bf16)]
    assert plans[1].speed.compute / plans[0].speed.compute == pytest.approx(1.24, abs=0.01)
    assert plans[0].peak < plans[1].peak


@pytest.fixture(scope="module")
def large():
    return load_config(["configs/20B.yml"], world_size=96, announce=False)


def test_the_anchor_of_gpt_neox_20b(large):
    """It ran at 747 tokens/s on each A100: 150,000 steps of 3.15 million tokens in 1,830 hours on 96 of them."""
    published = 150_000 * 1536 * 2048 / (1830 * 3600) / 96
    speed = _planner(large).plan(Layout.of(large)).speed
    assert published == pytest.approx(747, rel=0.01)
    assert published < speed.tokens_per_second / 96 < 1.3 * published
    assert speed.idle == pytest.approx(3 / 35, rel=0.05)
    slower = _planner(large, mfu=0.3).plan(Layout.of(large)).speed
    assert slower.compute == pytest.approx(speed.compute * 0.596 / 0.3, rel=1e-6)


def test_mfu_is_interpolated_between_published_runs():
    anchors = ((1e8, 0.4), (1e10, 0.6))
    assert interpolate(anchors, 1e9) == pytest.approx(0.5)
    assert interpolate(anchors, 1e6) == 0.4
    assert interpolate(anchors, 1e12) == 0.6


def test_changes_fit_keep_the_batch_and_have_no_needless_part():
    config = load_config(["configs/pythia/6-9B.yml"], overrides=["model_parallel_size=1"], world_size=8, announce=False)
    planner, limit = _planner(config), 40 * GIBIBYTE
    now = planner.plan(Layout.of(config))
    assert now.peak > limit
    ways = changes(planner, now, limit)
    assert len(ways) == 3
    assert [way.plan.speed.step for way in ways] == sorted(way.plan.speed.step for way in ways)
    for way in ways:
        assert way.plan.peak <= limit
        assert (way.plan.layout.gpus, way.plan.layout.batch) == (8, now.layout.batch)
        assert way.cost == pytest.approx(way.plan.speed.step / now.speed.step - 1)
        follows = {"gradient_accumulation_steps"}
        assert 1 <= len(way.settings.keys() - follows) <= 3


def test_search_ranks_what_fits(large):
    planner, now, limit = _planner(large), Layout.of(large), 40 * GIBIBYTE
    best = search(planner, now, limit)
    assert len(best) == 10
    times = [plan.speed.step for plan in best]
    assert times == sorted(times)
    assert times[0] < planner.plan(now).speed.step
    for plan in best:
        layout = plan.layout
        assert plan.peak <= limit
        assert layout.gpus == 96
        assert layout.batch == 1536
        assert planner.is_possible(layout)
        assert layout.tp <= 8
        assert layout.pp == 1 or layout.zero_stage == 1


def test_what_a_config_cannot_be_is_not_proposed(large):
    planner = _planner(large)
    assert not planner.is_possible(Layout(tp=3))  # 64 heads
    assert not planner.is_possible(Layout(pp=2, zero_stage=2))
    assert not planner.is_possible(Layout(pp=45))
    assert not planner.is_possible(Layout(sequence_parallel=True))
    assert planner.is_possible(Layout(tp=4, pp=4, zero_stage=1, sequence_parallel=True))
