"""`train_micro_batch_size_per_gpu: auto`: what it finds, that all ranks agree, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import MemoryShortageError
from megatron.parallel.mesh import Mesh
from megatron.planning import micro_batch as sizes_of
from megatron.planning.layout import Layout
from megatron.training import micro_batch
from megatron.training.micro_batch import with_micro_batch
from megatron.training.room import Room
from megatron.training.run import train
from tests.end_to_end.tiny import losses, settings, write_corpus
from tests.parallel.matrix import make_mesh
from tests.planning.small import VOCAB, config
from tests.ranks import preload, run_ranks

preload()
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": None, "train_batch_size": 24}
SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


def auto(world_size: int = 1, **keys: Any) -> Config:
    return config(world_size, **{**AUTO, **keys})


class FakeTrial:
    """A step of `size` needs 10 bytes a sequence and 100 besides; more than `most` run out of memory."""

    most = 10**9
    asked: ClassVar[list[int]] = []

    def __init__(self, *_: Any) -> None:
        type(self).asked = []

    def bytes_of(self, size: int) -> int | None:
        self.asked.append(size)
        return 100 + 10 * size if 100 + 10 * size <= self.most else None

    def close(self) -> None: ...


class FakePlanner:
    """The plan says `per_sequence` bytes."""

    def __init__(self, per_sequence: int) -> None:
        self.per_sequence = per_sequence

    def peak(self, layout: Layout) -> int:
        return self.per_sequence * layout.micro_batch


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def settle(free: int, planned: int, most: int = 10**9) -> None:
        monkeypatch.setattr(micro_batch, "room", lambda device: Room(peak=0, free=free, total=free))
        monkeypatch.setattr(micro_batch, "make_planner", lambda *_: FakePlanner(planned))
        monkeypatch.setattr(micro_batch, "_Trial", FakeTrial)
        monkeypatch.setattr(FakeTrial, "most", most)

    return settle


@pytest.mark.parametrize("planned", [1, 10, 15, 50, 10**6])
@pytest.mark.parametrize(("free", "most", "size"), [(240, 10**9, 12), (10**6, 220, 12), (10**6, 221, 12),
                                                    (10**6, 219, 8), (10**6, 10**9, 24), (126, 10**9, 1)])  # fmt: skip
def test_trying_finds_the_largest_from_any_guess(planned: int, free: int, most: int, size: int, fake: Any) -> None:
    """12 needs 220 bytes of the 95 % of 240 that may be used, 24 needs 340."""
    fake(free, planned, most)
    found, why = micro_batch._by_trying(auto(), Mesh.single(), VOCAB, SIZES)
    assert found == size
    assert len(FakeTrial.asked) == len(set(FakeTrial.asked)), "nothing is tried twice"
    assert f"{size} needs" in why


def test_nothing_fits(fake: Any) -> None:
    fake(100, 1)
    assert micro_batch._by_trying(auto(), Mesh.single(), VOCAB, SIZES)[0] == 0
    with pytest.raises(MemoryShortageError, match="no sequence fits"):
        with_micro_batch(auto(), Mesh.single(), VOCAB)


@pytest.mark.parametrize(("planned", "size"), [(1, 12), (24, 8), (200, 1)])
def test_measuring_draws_a_line_and_believes_a_larger_plan(planned: int, size: int, fake: Any) -> None:
    fake(280, planned)  # 224 bytes may be used; 24 sequences would need 340
    found, why = micro_batch._by_measuring(auto(), Mesh.single(), VOCAB, SIZES)
    assert found == size
    assert set(FakeTrial.asked) == {1, 2}
    assert "steps of 1 and 2 were measured" in why


def found_on_a_rank(keys: dict[str, Any], world_size: int, free: int | None) -> tuple[int, int, Any]:
    resolved = auto(world_size, **keys)
    mesh = make_mesh(resolved)
    if free is not None:
        rank = mesh.world.rank
        micro_batch.room = lambda device: Room(0, free * (1 + rank), free)  # type: ignore[assignment]
        micro_batch.make_planner = lambda *_: FakePlanner(10)  # type: ignore[assignment]
        micro_batch._Trial = FakeTrial  # type: ignore[assignment,misc]
    before = torch.get_rng_state()
    found = with_micro_batch(resolved, mesh, VOCAB).batch
    assert torch.equal(before, torch.get_rng_state())
    return found.train_micro_batch_size_per_gpu, found.gradient_accumulation_steps, found.train_batch_size


@pytest.mark.parametrize(
    ("world_size", "keys", "own"),
    [(1, {}, 24), (2, {}, 12), (2, {"stage": 1}, 12), (2, {"stage": 3}, 12), (2, {"model_parallel_size": 2}, 24),
     (2, {"pipe_parallel_size": 2, "stage": 1}, 24)],
)  # fmt: skip
def test_small_models_take_their_whole_batch_under_every_engine(
    world_size: int, keys: dict[str, Any], own: int
) -> None:
    found = run_ranks(world_size, found_on_a_rank, keys, world_size, None)
    assert found == [(own, 1, 24)] * world_size


def test_the_rank_with_least_memory_decides() -> None:
    assert run_ranks(2, found_on_a_rank, {}, 2, 500) == [(6, 2, 24)] * 2  # 200 bytes may be used on rank 0


def test_sizes_divide_what_a_process_computes() -> None:
    layout = Layout.of(auto())
    assert sizes_of.sizes(layout) == SIZES
    for size in SIZES:
        assert sizes_of.sized(layout, size).batch == 24


def run(folder: Path, keys: dict[str, Any]) -> list[float]:
    """Run inside a rank: train, and return the losses."""
    values = settings(folder, **{"hidden_dropout": 0.0, "attention_dropout": 0.0, **keys})
    train(resolve({key: value for key, value in values.items() if value is not None}, world_size=1), Mesh.single())
    return list(losses(folder).values())


def test_losses_do_not_depend_on_what_is_found_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[float]] = {}
    for name in ("auto", "given"):
        write_corpus(tmp_path / name / "corpus")
        keys = AUTO if name == "auto" else {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
        keys = {**keys, "train_batch_size": 8, "train_iters": 4}
        (found[name],) = run_ranks(1, run, tmp_path / name, keys)
    assert found["auto"] == pytest.approx(found["given"], rel=1e-5)
    monkeypatch.setattr(micro_batch, "_found", lambda *_: pytest.fail("a resume searches again"))
    run_ranks(
        1, run, tmp_path / "auto", {**AUTO, "train_batch_size": 8, "train_iters": 6, "override_lr_scheduler": True}
    )


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_filled() -> None:
    """What is found runs, and the next size does not fit; nothing of the trial stays."""
    device = torch.device("cuda")
    keys = {"num_layers": 8, "hidden_size": 2048, "num_attention_heads": 16, "seq_length": 2048, "precision": "bf16"}
    resolved = auto(**keys, max_position_embeddings=2048, train_batch_size=1024)
    before = torch.cuda.memory_allocated()
    found = with_micro_batch(resolved, Mesh.single(device), 50304).batch.train_micro_batch_size_per_gpu
    assert 1 < found < 1024
    assert torch.cuda.memory_allocated() <= before + 2**26
