"""What the live engine does is compared with the config, and combinations that cannot run are refused."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import pytest
import torch

from megatron.engine import build
from megatron.engine.local import LocalEngine
from megatron.errors import EngineError
from tests.ranks import preload, run_ranks

preload()
from megatron.engine import through_deepspeed  # noqa: E402
from tests.engine import tiny  # noqa: E402


@contextmanager
def replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


SABOTAGE = {
    # what DeepSpeed is told instead -> what the error must name
    "clipping": ({"gradient_clipping": 0.0}, "gradient_clipping = 0.3: the live engine has 0.0"),
    "offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        r"zero_optimization.offload_optimizer.device = none: the live engine has cpu",
    ),
    "stage": ({"zero_optimization": {"stage": 2}}, r"zero_optimization.stage = 1: the live engine has 2"),
    "accumulation": (
        {"gradient_accumulation_steps": 2, "train_batch_size": 4},
        "gradient_accumulation_steps = 1: the live engine has 2",
    ),
    "sums": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        "precision of accumulation = fp32: the live engine has bf16",
    ),
    "traffic": ({"communication_data_type": "bf16"}, "precision of communication = fp32: the live engine has bf16"),
    "precision": ({"bf16": {"enabled": False}}, "precision of the parameters = bf16: the live engine has fp32"),
    "batch": (
        {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1},
        "train_micro_batch_size_per_gpu = 2: the live engine has 1",
    ),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_setting_that_did_not_arrive_is_fatal(case):
    changes, message = SABOTAGE[case]
    told = through_deepspeed.deepspeed_config

    def start() -> None:
        with replaced(through_deepspeed, "deepspeed_config", lambda config: {**told(config), **changes}):
            tiny.make_engine(tiny.config(1, stage=1, precision="bf16"))

    with pytest.raises(EngineError, match=message):
        run_ranks(1, start)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_optimizer_with_other_settings_is_fatal(stage):
    """The decay of one group is changed between the optimizer and the engine."""
    initialize = deepspeed.initialize

    def spoil(optimizer):
        optimizer.param_groups[1]["weight_decay"] = 0.1
        return optimizer

    def start() -> None:
        def spoiled(**keys):
            return initialize(**{**keys, "optimizer": spoil(keys["optimizer"])})

        def local(config, mesh, model, optimizer, objective):
            return LocalEngine(config, mesh, model, spoil(optimizer), objective)

        with replaced(deepspeed, "initialize", spoiled), replaced(build, "LocalEngine", local):
            tiny.make_engine(tiny.config(1, stage=stage))

    with pytest.raises(EngineError, match=r"optimizer groups = .*the live engine has"):
        run_ranks(1, start)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_that_are_not_the_weights_are_fatal_on_every_rank(stage):
    def start() -> str:
        engine = tiny.make_engine(tiny.config(2, stage=stage, precision="bf16"))
        if engine._mesh.dp.rank == 1:
            engine._holdings().held[0].master.add_(1.0)
        with pytest.raises(EngineError) as caught:
            engine.check_masters()
        return str(caught.value)

    for message in run_ranks(2, start):
        assert "1 fragments of weights differ from their fp32 masters" in message


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_clipping_is_real(stage, precision, world_size):
    """One huge gradient: what the optimizer receives has norm 1, whatever the engine reports."""

    def step() -> tuple:
        config = tiny.config(world_size, stage=stage, precision=precision, gradient_clipping=1.0)
        engine = tiny.make_engine(config)
        objective = engine._objective
        engine._objective = lambda model, batch: tuple(1e4 * value for value in objective(model, batch))
        squares = []

        def measured(gradients, masters, averages, moments, weights, coefficient, *rest) -> None:
            squares.extend((gradient.float() * coefficient).square().sum().item() for gradient in gradients)
            update(gradients, masters, averages, moments, weights, coefficient, *rest)

        one_pass = engine._one_update._update if stage else engine._one_pass
        update, one_pass._update = one_pass._update, measured  # the kernel clips as it reads
        (result,) = tiny.train(engine, config, 0, 1)
        share = sum(squares) / (world_size if stage == 0 else 1)  # stage 0 has all of it on every rank
        return result, share

    ranks = run_ranks(world_size, step)
    for result, _ in ranks:
        assert result.grad_norm > 1e3
        assert result.clipped_grad_norm == pytest.approx(1.0, rel=1e-5)
    assert sum(share for _, share in ranks) ** 0.5 == pytest.approx(1.0, rel=1e-5)


def test_the_wrong_number_of_micro_batches_is_said():
    def step() -> None:
        config = tiny.config(1, gradient_accumulation_steps=2)
        engine = tiny.make_engine(config)
        engine.train_step(tiny.micro_batches(config, 0, engine._mesh)[:1], 0)

    with pytest.raises(EngineError, match="1 micro-batches: a step takes gradient_accumulation_steps = 2"):
        run_ranks(1, step)


OFFLOADED = [
    (1, {"offload_optimizer": {"device": "cpu"}}),
    (2, {"offload_optimizer": {"device": "cpu"}}),
    (3, {"offload_optimizer": {"device": "cpu"}}),
    (3, {"offload_param": {"device": "cpu"}}),
    (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "offload"), OFFLOADED, ids=str)
def test_offloading_changes_no_number(stage, offload, precision, world_size):
    """torch's own AdamW on the CPU, so that nothing is compiled; what is offloaded is read back."""

    def run(zero) -> tuple:
        config = tiny.config(
            world_size, precision=precision, zero_optimization={"stage": stage, **zero}, gradient_accumulation_steps=2
        )
        engine = tiny.make_engine(config)
        gradients = tiny.capture_gradients(engine)
        results = tiny.train(engine, config, 0, 3)
        engine.check_masters()
        facts = engine.read_back()
        devices = {
            entry: facts[f"zero_optimization.{entry}.device"] for entry in ("offload_optimizer", "offload_param")
        }
        return results, gradients, devices, tiny.full_state(engine)

    plain = run_ranks(world_size, run, {})
    offloaded = run_ranks(world_size, run, offload)
    for (results, gradients, devices, _), (expected, exact, _, _) in zip(offloaded, plain, strict=True):
        assert devices == {entry: "cpu" if entry in offload else "none" for entry in devices}
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-6)
        for ours, theirs in zip(gradients, exact, strict=True):
            for name, gradient in theirs.items():
                torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-7)
    expected = tiny.merge([rank[3] for rank in plain])
    for key, tensor in tiny.merge([rank[3] for rank in offloaded]).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


OPTIONS = [
    {"stage": 1, "parameter_alignment": True},
    {"stage": 1, "reduce_bucket_size": 500, "allgather_bucket_size": 500},
    {"stage": 1, "overlap_comm": True},
    {"stage": 2, "reduce_bucket_size": 500, "contiguous_gradients": False},
    {"stage": 2, "reduce_scatter": False, "parameter_alignment": True},
    {"stage": 2, "overlap_comm": True},
    {"stage": 3, "reduce_bucket_size": 500, "sub_group_size": 900},
    {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
    {"stage": 3, "stage3_param_persistence_threshold": 100_000},
    {"stage": 3, "zero_hpz_partition_size": 2},
]


@pytest.mark.parametrize("zero", OPTIONS, ids=str)
def test_options_of_zero_change_no_number_and_no_state(zero):
    def run() -> tuple:
        config = tiny.config(2, zero_optimization=zero, gradient_accumulation_steps=2)
        engine = tiny.make_engine(config)
        results = tiny.train(engine, config, 0, 3)
        engine.check_masters()
        return results, tiny.full_state(engine)

    losses, gradients, weights = tiny.reference(tiny.config(2, gradient_accumulation_steps=2), 3)
    ranks = run_ranks(2, run)
    assert [result.loss for result in ranks[0][0]] == pytest.approx(losses, rel=1e-6)
    assert [result.grad_norm for result in ranks[0][0]] == pytest.approx([norm for norm, _ in gradients], rel=1e-6)
    state = tiny.merge([pieces for _, pieces in ranks])
    for name, expected in weights.items():
        torch.testing.assert_close(state[name, "weight"], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_engines_measure_check_and_overlap_nothing(stage, precision):
    """Read from the live objects: timers, traces and second looks at gradients would wait for the GPU."""

    def step() -> tuple:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        looks = []
        DeepSpeedZeroOptimizer.has_overflow = lambda self, *_: looks.append(1) or False
        config = tiny.config(2, stage=stage, precision=precision)
        engine = tiny.make_engine(config)
        tiny.train(engine, config, 0, 2)
        live = engine._live
        overlaps = [getattr(live.optimizer, "overlap_comm", False), live._config.zero_config.overlap_comm]
        timed = [live.wall_clock_breakdown(), live.tput_timer.config.enabled, live.tput_timer.config.synchronized]
        return len(looks), overlaps, timed, live._config.memory_breakdown

    assert run_ranks(2, step) == [(0, [False, False], [False] * 3, False)] * 2


def test_engines_are_chosen_and_say_why(caplog):
    """The same config on one process: our own engine by itself, DeepSpeed's where it is asked for."""

    def kinds() -> list:
        caplog.set_level("INFO")
        found = []
        for stage, engine in ((1, "auto"), (3, "auto"), (0, "deepspeed"), (2, "deepspeed"), (2, "local")):
            built = tiny.make_engine(tiny.config(1, stage=stage, engine=engine))
            facts = built.read_back()
            said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("engine: ")]
            found.append((type(built).__name__, facts["zero_optimization.stage"], said[-1]))
        return found

    replica = "on one replica ZeRO stage {} has nothing to shard, and the arithmetic is the same"
    asked = "engine: deepspeed asks for it"
    assert run_ranks(1, kinds)[0] == [
        ("LocalEngine", 0, "engine: our own, as " + replica.format(1)),
        ("LocalEngine", 0, "engine: our own, as " + replica.format(3)),
        ("DeepSpeedEngine", 1, f"engine: DeepSpeed's, as {asked}; stage 0 is served by stage 1, whose arithmetic is "
         "the same"),
        ("DeepSpeedEngine", 2, f"engine: DeepSpeed's, as {asked}"),
        ("LocalEngine", 0, "engine: our own, as engine: local asks for it"),
    ]  # fmt: skip


def test_our_own_engine_needs_no_deepspeed():
    """Neither the package nor the compiler is loaded by a run that uses neither."""
    code = (
        "import sys, torch\n"
        "from megatron.launch.lean import defer_compiler\n"
        "defer_compiler()\n"
        "import megatron.training.run\n"
        "from megatron.config.resolve import resolve\n"
        "from megatron.engine.build import build_engine\n"
        "from megatron.model.build import build_model\n"
        "from megatron.objectives.build import build_objective\n"
        "from megatron.parallel.mesh import Mesh\n"
        "from megatron.data.batch import Batch\n"
        "keys = dict(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=8, max_position_embeddings=8,\n"
        "            train_micro_batch_size_per_gpu=1, train_iters=3, zero_optimization=dict(stage=1))\n"
        "config = resolve(keys)\n"
        "engine = build_engine(config, Mesh.single(), build_model(config, 32, Mesh.single()), build_objective())\n"
        "tokens = torch.ones(1, 8, dtype=torch.long)\n"
        "engine.train_step([Batch(tokens, tokens, torch.ones(1, 8))], 0)\n"
        "print([name for name in ('deepspeed', 'torch._dynamo', 'transformers', 'triton') if name in sys.modules])\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
