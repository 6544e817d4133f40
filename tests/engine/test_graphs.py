"""CUDA graphs: how they are recorded, what is refused, and on a GPU the same training as without.

`test_recorded.py` has what a CPU can show of the steps themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from megatron.data.batch import Batch
from megatron.engine import graphs
from megatron.engine.build import build_engine
from megatron.engine.graphs import WARM_UP, CudaRecorder, Piece, obstacle
from megatron.errors import ConfigError, EngineError
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.parallel.mesh import Axis, Mesh
from tests.engine.sources import Tensors
from tests.parallel import matrix


def mesh(device: str, **sizes: int) -> Mesh:
    """Return a mesh that only says where it is."""
    axes = {name: Axis(name, sizes.get(name, 1)) for name in ("dp", "tp", "pp", "cp", "replicas", "ep", "world")}
    return Mesh(**axes, device=torch.device(device))


@pytest.mark.parametrize(
    ("keys", "where", "reason"),
    [
        ({}, mesh("cpu"), "they need a CUDA device, and this is cpu."),
        ({}, mesh("cuda", tp=2), "processes that share a layer or a sequence"),
        ({}, mesh("cuda", cp=2), "processes that share a layer or a sequence"),
        ({"checkpoint_activations": True}, mesh("cuda"), "the random generator's state"),
        ({"offload_activations": True}, mesh("cuda"), "offload_activations copies to the CPU"),
        ({"optimizer_in_backward": True, "gradient_clipping": 0}, mesh("cuda"), "updates weights within"),
        ({"checkpoint_activations": True, "checkpoint_operations": ["norm", "activation"]}, mesh("cuda"), ""),
        ({"hidden_dropout": 0.1}, mesh("cuda", dp=2), ""),
    ],
)
def test_what_cannot_be_recorded(keys: dict[str, Any], where: Mesh, reason: str) -> None:
    found = obstacle(matrix.make_config(keys), where)
    assert found.startswith(reason) if reason.startswith("they") else reason in found
    assert bool(found) == bool(reason)


def test_asking_for_it_on_a_cpu_is_an_error() -> None:
    config = matrix.make_config({"cuda_graphs": True})
    with pytest.raises(ConfigError, match=r"cuda_graphs = true: they need a CUDA device.*Set cuda_graphs: auto"):
        build_engine(config, Mesh.single(), build_model(config, matrix.VOCAB, Mesh.single()), build_objective())


class Stream:
    """Notes who waits for whom; a stand-in for torch.cuda.Stream."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA, in order."""
    found: list[str] = []
    here = Stream("here", found)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        found.append(f"on {chosen.name}")
        yield
        found.append(f"off {chosen.name}")

    @contextmanager
    def graph(made: Any, pool: str, chosen: Stream, capture_error_mode: str) -> Iterator[None]:
        found.append(f"capture in {pool} on {chosen.name}, {capture_error_mode}")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        found.append("captured")

    class Graph:
        def replay(self) -> None:
            found.append("replay")

    streams, pools = count(1), count(1)
    stand_ins = {
        "Stream": lambda device: Stream(f"side {next(streams)}", found),
        "current_stream": lambda device: here, "stream": stream,
        "graph": graph, "CUDAGraph": Graph, "graph_pool_handle": lambda: f"pool {next(pools)}",
        "synchronize": lambda device: found.append("wait"),
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_work_is_warmed_up_on_the_stream_that_it_is_recorded_on(notes: list[str]) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    piece = Piece(recorder, lambda: notes.append("work"))
    warm = ["side 1 waits for here", "on side 1", "work", "off side 1", "here waits for side 1"]
    for _ in range(WARM_UP):
        piece()
    assert notes == warm * WARM_UP
    notes.clear()
    piece()
    piece()
    assert notes == ["capture in pool 1 on side 1, thread_local", "work", "captured", "replay", "replay"]
    recorder.start_anew()
    notes.clear()
    recorder.record(lambda: notes.append("work"))
    assert notes == ["capture in pool 2 on side 1, thread_local", "work", "captured"]


@pytest.mark.usefixtures("notes")
def test_what_cannot_be_captured_ends_the_run_with_a_way_out() -> None:
    def work() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(EngineError, match=r"cuda_graphs = true: a step .* not permitted .* Set cuda_graphs: auto"):
        CudaRecorder(torch.device("cuda")).record(work)


ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


def gpu_engine(config: Any) -> tuple[Any, list[list[Batch]]]:
    """Return an engine on the GPU, and the micro-batches of eight steps."""
    device = Mesh.single(torch.device("cuda"))
    engine = build_engine(config, device, build_model(config, matrix.VOCAB, device), build_objective())
    steps = [matrix.micro_batches(config, batch, device) for batch in matrix.make_batches(config, steps=8)]
    return engine, [[batch.to("cuda") for batch in step] for step in steps]


def gpu_run(config: Any, warm_up: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], tuple[float, int], Any]:
    """Return the results of eight steps, an evaluation behind the sixth of them, and the state."""
    monkeypatch.setattr(graphs, "WARM_UP", warm_up)
    engine, steps = gpu_engine(config)
    pending = [engine.queue_step(step, iteration) for iteration, step in enumerate(steps[:6])]
    evaluation = engine.evaluate(steps[0])[:2]
    pending += [engine.queue_step(step, iteration) for iteration, step in enumerate(steps[6:], start=6)]
    engine.check_masters()
    state = {(piece.name, piece.kind): piece.data.detach().cpu().clone() for piece in engine.state_pieces()}
    return [each.read() for each in pending], evaluation, state


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "torch's kernels": {"precision": "bf16", "optimizer_fusion": False},
    "moments in bf16": {"precision": "bf16", "moments_dtype": "bf16"},
    "sgd": {"optimizer": {"type": "sgd", "params": {"lr": 1e-2, "momentum": 0.9}}},
    "lion": {"optimizer": {"type": "lion", "params": {"lr": 1e-3}}},
    "madgrad": {"optimizer": {"type": "madgrad_wd", "params": {"lr": 1e-3}}},
    "sm3": {"optimizer": {"type": "sm3", "params": {"lr": 1e-2, "momentum": 0.9}}, "weight_decay": 0.0},
}


@on_gpu
@pytest.mark.parametrize(
    ("case", "micro_batches"), [*((case, 1) for case in CASES), ("bf16", 4), ("fp16", 4), ("dropout", 4)]
)
def test_replayed_steps_equal_others(case: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another rate, batch, mask of dropout and loss scale in each step; a graph and the same work without one."""
    config = matrix.make_config({"cuda_graphs": True, "gradient_accumulation_steps": micro_batches, **CASES[case]})
    found, expected = (gpu_run(config, warm_up, monkeypatch) for warm_up in (WARM_UP, 10**9))
    tolerance = 1e-2 if config.numerics.weight_precision != "fp32" else 1e-4
    for one, two in zip(found[0], expected[0], strict=True):
        assert one.loss == pytest.approx(two.loss, rel=tolerance / 10)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=tolerance)
        assert (one.skipped, one.loss_scale, one.num_tokens) == (two.skipped, two.loss_scale, two.num_tokens)
    assert found[1] == pytest.approx(expected[1], rel=tolerance / 10)
    steps = {key: value for key, value in expected[2].items() if key[1] == "step"}
    assert all(torch.equal(found[2][key], value) for key, value in steps.items())


@on_gpu
def test_the_engine_without_graphs_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"precision": "bf16", "gradient_accumulation_steps": 1}
    (found, evaluation, _), (expected, other, _) = (
        gpu_run(matrix.make_config({**keys, "cuda_graphs": asked}), WARM_UP, monkeypatch) for asked in (True, False)
    )
    for one, two in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-3)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-2)
    assert evaluation == pytest.approx(other, rel=1e-3)


@on_gpu
def test_a_step_is_one_graph_that_nobody_waits_for() -> None:
    engine, steps = gpu_engine(matrix.make_config({"cuda_graphs": True, "precision": "bf16"}))
    for iteration in range(WARM_UP + 1):
        engine.train_step(steps[iteration], iteration)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        torch.cuda.set_sync_debug_mode("error")
        try:
            pending = engine.queue_step(steps[5], 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in record.events()]
    assert names.count("aten::mm") == names.count("aten::addmm") == 0, "the passes were not replayed"
    assert pending.read().loss > 0


@on_gpu
def test_recordings_end_where_their_tables_or_tensors_do() -> None:
    """A validation of another length, and a checkpoint that is loaded; steps behind them are recorded again."""
    config = matrix.make_config({"cuda_graphs": True, "precision": "fp16", "train_iters": 40})
    engine, steps = gpu_engine(config)
    other, _ = gpu_engine(config)
    state = {(piece.name, piece.kind): piece.data.detach().clone() for piece in other.state_pieces()}
    shapes = {(piece.name, piece.kind): piece.shape for piece in other.state_pieces()}
    short = [Batch(each.tokens[:, :5], each.labels[:, :5], each.loss_mask[:, :5]) for each in steps[0]]
    losses = [[engine.train_step(step, number).loss for number, step in enumerate(steps)]]
    assert engine.evaluate(short)[1] > 0
    engine.examine(steps[0], 0)
    for _ in range(2):
        engine.load_state(Tensors({key: each.view(shapes[key]) for key, each in state.items()}), with_optimizer=True)
        losses.append([engine.train_step(step, number).loss for number, step in enumerate(steps)])
        assert engine._recordings.piece("step", dict).is_recorded
    for again in losses[1:]:
        assert again == pytest.approx(losses[0], rel=1e-2)
