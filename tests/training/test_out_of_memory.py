"""A run without enough memory says what it held, what was planned, and what would need less; it fails on every rank."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.resolve import resolve
from megatron.engine.memory import held
from megatron.errors import MemoryShortageError
from megatron.model.mlp import MLP
from megatron.parallel.mesh import Mesh
from megatron.planning import machine
from megatron.planning.layout import Layout
from megatron.planning.memory import state_bytes
from megatron.training.out_of_memory import is_out_of_memory
from megatron.training.run import train
from tests.end_to_end.tiny import settings, write_corpus
from tests.planning.small import config as small_config
from tests.ranks import preload, run_ranks

preload()
from megatron.engine.build import build_engine  # noqa: E402
from megatron.model.build import build_model  # noqa: E402
from megatron.objectives.build import build_objective  # noqa: E402
from tests.planning.small import VOCAB, batch  # noqa: E402


def run(folder: str, keys: dict[str, Any], world_size: int = 1, limit: int | None = None) -> str:
    """Run inside a rank: train, and return what the error says."""
    if limit is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit,) * 2)
    values = settings(Path(folder), save=None, checkpoint_factor=None, resume="never", **keys)
    config = resolve({key: value for key, value in values.items() if value is not None}, world_size)
    mesh = Mesh.create() if world_size > 1 else Mesh.single()
    with pytest.raises(MemoryShortageError) as caught:
        train(config, mesh)
    assert caught.value.exit_code == 1
    assert is_out_of_memory(caught.value.__cause__)
    return str(caught.value)


def run_with_a_layer_that_fails(folder: str, keys: dict[str, Any], world_size: int) -> str:
    forward, calls = MLP.forward, []

    def failing(self: MLP, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 10:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return forward(self, hidden)

    MLP.forward = failing  # type: ignore[method-assign]
    return run(folder, keys, world_size)


@pytest.mark.parametrize(("world_size", "keys"), [(1, {"zero_optimization": {"stage": 0}}), (2, {})])
def test_the_message(world_size: int, keys: dict[str, Any], tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    keys = {**keys, "train_micro_batch_size_per_gpu": 8, "precision": "bf16", "eval_iters": 0}
    texts = run_ranks(world_size, run_with_a_layer_that_fails, str(tmp_path), keys, world_size)
    for rank, text in enumerate(texts):
        place = "cpu" if world_size == 1 else f"cpu of rank {rank}"
        assert text.startswith(f"{place}: out of memory at step 3: Tried to allocate 20.00 GiB.\n")
        rows = dict(re.findall(r"^  (\S.*?)  +(?=\S+ +\S+$)(.*)$", text, re.MULTILINE))
        for term in ("weights", "masters", "moments"):
            measured, planned = map(float, rows[term].split())
            assert measured == pytest.approx(planned, rel=0.06), term
        names = re.findall(r"^  \d+\. +\S+ GiB  (.*?): ", text, re.MULTILINE)
        assert names[0] == "a micro-batch of 4"
        wanted = ["norms and activations computed twice", "moments in bf16"]
        assert [name for name in names if name in wanted] == wanted
        assert "train_micro_batch_size_per_gpu: 4\n" in text
        assert "gradient_accumulation_steps: 4\n" in text
        assert "checkpoint_operations: [norm, activation]\n" in text


def test_a_limit_of_the_system_is_recognised(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    keys = {"train_micro_batch_size_per_gpu": 8192, "gradient_accumulation_steps": 1, "eval_iters": 0}
    (text,) = run_ranks(1, run, str(tmp_path), {**keys, "zero_optimization": {"stage": 0}}, 1, 300 * 2**20)
    assert "can't allocate memory" in text
    assert "a micro-batch of 4096: train_micro_batch_size_per_gpu: 4096" in text


@pytest.mark.parametrize(
    ("error", "found"),
    [(torch.OutOfMemoryError("x"), True), (MemoryError(), True), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
     (RuntimeError("shape mismatch"), False), (ValueError("out of memory"), False), (None, False)],
)  # fmt: skip
def test_what_is_a_lack_of_memory(error: Exception | None, found: bool) -> None:
    assert is_out_of_memory(error) is found


def terms(stage: int, keys: dict[str, Any]) -> tuple[int, Any]:
    resolved = small_config(2, stage, **keys)
    mesh = Mesh.create()
    model = build_model(resolved, VOCAB, mesh)
    engine = build_engine(resolved, mesh, model, build_objective())
    engine.train_step([batch(resolved) for _ in range(2)], 0)
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()), held(engine, mesh.device)


@pytest.mark.parametrize("stage", range(4))
def test_what_is_held_is_found_in_every_engine(stage: int) -> None:
    keys = {"moments_dtype": "bf16"}
    resolved = small_config(2, stage, **keys)
    for numel, found in run_ranks(2, terms, stage, keys):
        planned = state_bytes(resolved, Layout.of(resolved), numel)
        for term in ("weights", "masters", "moments"):
            assert getattr(found, term) == pytest.approx(getattr(planned, term), rel=0.05), term
        if stage == 0:
            assert found.gradients == pytest.approx(planned.gradients, rel=0.05)


def test_the_machine_is_measured() -> None:
    assert 0 < machine.resident_memory() <= machine.peak_memory() <= machine.total_memory()
    assert 0 < machine.available_memory() <= machine.total_memory()
    kept = torch.ones(64 * 2**20 // 4)
    peak = machine.peak_memory()
    del kept
    machine.forget_peak()
    assert machine.peak_memory() <= peak


def test_a_container_has_what_its_limit_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.total_memory() > 2**30
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert (machine.total_memory(), machine.available_memory()) == (1_000_000, 600_000)
