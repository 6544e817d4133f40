"""Copies of a tensor that differ are found, in every layout, and named on every rank with the ranks that hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import preload, run_ranks

preload()
from megatron.engine import replicas  # noqa: E402
from megatron.engine.build import build_engine  # noqa: E402
from megatron.errors import EngineError  # noqa: E402
from megatron.model.build import build_model  # noqa: E402
from megatron.objectives.build import build_objective  # noqa: E402
from tests.parallel import matrix  # noqa: E402

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2, ZeRO 1": (2, {"stage": 1}),
    "dp2, ZeRO 2, bf16": (2, {"stage": 2, "precision": "bf16"}),
    "dp2, ZeRO 3": (2, {"stage": 3}),
    "tp2": (2, {"model_parallel_size": 2}),
    "tp2, sequence, ZeRO 1, bf16": (
        2, {"model_parallel_size": 2, "sequence_parallel": True, "stage": 1, "precision": "bf16"}
    ),
    "tp2, dp2": (4, {"model_parallel_size": 2}),
    "tp2, dp2, ZeRO 3": (4, {"model_parallel_size": 2, "stage": 3}),
    "pp2, tied": (2, {"pipe_parallel_size": 2, "no_weight_tying": False, "stage": 1}),
    "pp2, dp4, tied": (8, {"pipe_parallel_size": 2, "no_weight_tying": False, "stage": 1}),
    "pp2, dp4, tied, bf16": (
        8, {"pipe_parallel_size": 2, "no_weight_tying": False, "stage": 1, "precision": "bf16"}
    ),
    "pp2, tp2, tied": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2, "no_weight_tying": False, "stage": 1}),
}  # fmt: skip


def make_engine(flat: dict[str, Any], world_size: int) -> tuple[Any, Any]:
    config = matrix.make_config(flat, world_size)
    mesh = matrix.make_mesh(config)
    return config, build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())


def caught(engine: Any) -> str:
    """Return what check_replicas says; "" where all copies are alike."""
    try:
        engine.check_replicas()
    except EngineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_are_alike_after_training(name: str) -> None:
    world_size, flat = LAYOUTS[name]

    def train() -> str:
        config, engine = make_engine(flat, world_size)
        for step, batch in enumerate(matrix.make_batches(config)[:3]):
            engine.train_step(matrix.micro_batches(config, batch, engine._mesh), step)
        return caught(engine)

    assert run_ranks(world_size, train) == [""] * world_size


def spoiled(name: str, rank: int, weight: str, kind: str = "weight") -> list[str]:
    """Return what every rank says after a step, and after one bit of a weight or its master changed on one rank."""
    world_size, flat = LAYOUTS[name]

    def spoil() -> str:
        config, engine = make_engine(flat, world_size)
        engine.train_step(matrix.micro_batches(config, matrix.make_batches(config)[0], engine._mesh), 0)
        if dist.get_rank() == rank:
            (copy,) = [
                c for c in replicas.copies(engine.model, engine._holdings()) if (c.name, c.kind) == (weight, kind)
            ]
            bits = copy.tensor.view(-1).view(torch.int32 if copy.tensor.element_size() == 4 else torch.int16)
            bits[-1] += 1
        return caught(engine)

    return run_ranks(world_size, spoil)


NORM, LINEAR = "layers.1.input_layernorm.weight", "layers.0.mlp.linear1.weight"
EMBEDDING = "embedding.word_embeddings.weight"

CASES = [
    # layout, the rank that is spoiled, its tensor, kind, the places of the two versions
    ("dp2", 1, LINEAR, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp1 tp0"]),
    ("dp2, ZeRO 1", 0, LINEAR, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp1 tp0"]),
    ("dp2, ZeRO 2, bf16", 1, NORM, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp1 tp0"]),
    ("dp2, ZeRO 3", 1, NORM, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp1 tp0"]),
    ("tp2", 1, NORM, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp0 tp1"]),
    ("tp2, sequence, ZeRO 1, bf16", 1, NORM, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp0 tp1"]),
    ("tp2, sequence, ZeRO 1, bf16", 1, NORM, "master", ["rank 0 pp0 dp0 tp0", "rank 1 pp0 dp0 tp1"]),
    ("tp2, dp2", 3, LINEAR, "weight", ["rank 1 pp0 dp0 tp1", "rank 3 pp0 dp1 tp1"]),
    ("pp2, tied", 1, EMBEDDING, "weight", ["rank 0 pp0 dp0 tp0", "rank 1 pp1 dp0 tp0"]),
    ("pp2, tp2, tied", 3, EMBEDDING, "weight", ["rank 1 pp0 dp0 tp1", "rank 3 pp1 dp0 tp1"]),
]


@pytest.mark.parametrize(("name", "rank", "weight", "kind", "places"), CASES, ids=lambda value: str(value)[:30])
def test_one_changed_bit_is_named_on_every_rank(
    name: str, rank: int, weight: str, kind: str, places: list[str]
) -> None:
    for message in spoiled(name, rank, weight, kind):
        assert message.startswith(f"{weight} ({kind}) has 2 versions: its copies must be alike and are not: ")
        assert all(place in message for place in places)
        assert len(message.splitlines()) == 1


def test_the_odd_one_out_is_named_first() -> None:
    """With 4 replicas of an unsplit weight, one of them wrong: it stands before those that agree with each other."""
    for message in spoiled("tp2, dp2", 3, NORM):
        odd, others = message.split("are not: ")[1].split(";")[:2]
        assert odd == "rank 3 pp0 dp1 tp1"
        assert "rank 1 pp0 dp0 tp1" in others
        assert "rank 2 pp0 dp1 tp0" in others


def test_shares_of_split_weights_may_differ() -> None:
    """Under ZeRO 3 with tensor parallelism, what is held nowhere else is compared with nothing."""
    assert spoiled("tp2, dp2, ZeRO 3", 3, LINEAR) == [""] * 4


def test_checksums_see_every_bit() -> None:
    values = torch.tensor([1.0, -0.0, float("nan"), 3.0])
    (before,) = replicas.checksums([values], torch.device("cpu")).tolist()
    for index in range(4):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[index] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert replicas.checksums([changed], torch.device("cpu")).item() != before
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert replicas.checksums([values.to(dtype)], torch.device("cpu")).dtype == torch.int64


def test_a_run_stops_where_copies_differ() -> None:
    """Rank 1's weight changes in step 2; the loop compares every 2 steps."""
    from dataclasses import dataclass, field

    from megatron.training import loop
    from megatron.training.progress import Progress
    from megatron.training.stop import Agreement

    @dataclass
    class Nothing:
        consumed_samples: int = 0
        calls: list[int] = field(default_factory=list)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **keys: None

    @dataclass
    class Loader:
        batches: list[Any]
        consumed_samples: int = 0

        def __next__(self) -> Any:
            self.consumed_samples += 1
            return self.batches[self.consumed_samples - 1]

    class Keeper(Nothing):
        def written(self) -> list[Any]:
            return []

    class Monitor(Nothing):
        @property
        def timers(self) -> Any:
            from megatron.monitor.timers import Timers

            return Timers()

    def train() -> tuple[str, int]:
        config, engine = make_engine({"check_replicas_interval": 2, "eval_iters": 0}, 2)
        steps: list[int] = []
        step = engine.queue_step

        def spoiling(batches: Any, iteration: int, *settings: Any) -> Any:
            result = step(batches, iteration, *settings)
            steps.append(iteration)
            if iteration == 0 and dist.get_rank() == 1:
                engine.model.get_parameter(NORM).data[0] += 1
            return result

        engine.queue_step = spoiling
        batches = [matrix.micro_batches(config, batch, engine._mesh) for batch in matrix.make_batches(config)]
        run = loop.Run(config.training, 5, engine, Loader(batches), None, Keeper(), Monitor(), Agreement(engine._mesh))  # type: ignore[arg-type]
        try:
            loop.run_loop(run, Progress())
        except EngineError as error:
            return str(error), len(steps)
        return "", len(steps)

    for message, steps in run_ranks(2, train):
        assert message.startswith(f"{NORM} (weight) has 2 versions")
        assert steps == 2
