"""Inside a step of our own engine nothing is read from the device, in any precision, alone and with other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import preload, run_ranks

preload()
from megatron.engine.wishes import Wish  # noqa: E402
from tests.parallel import matrix  # noqa: E402

_READING_OPERATIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "_unique2", "masked_select"}
_READING_METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__"}


class Operations(TorchDispatchMode):
    """Counts the operations that make the host wait: reads of values, and blocking copies from another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, keys = function.overloadpacket.__name__, kwargs or {}
        if name in _READING_OPERATIONS:
            self.found[name] += 1
        result = function(*args, **keys)
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        if name in ("copy_", "_to_copy") and len({tensor.device for tensor in tensors}) > 1:
            self.found[f"{name} between devices"] += 1
        return result


class Methods(TorchFunctionMode):
    """Counts what dispatching does not see: `tolist` of a CPU tensor reads its memory without an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _READING_METHODS:
            self.found[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def reads(action: Callable[[], Any]) -> Counter[str]:
    """Return what made the host wait while `action` ran."""
    operations, methods = Operations(), Methods()
    with operations, methods:
        action()
    return operations.found + methods.found


def reads_of_steps(world_size: int, **keys: Any) -> tuple[Counter[str], list[Any]]:
    """Return what three steps read, and their results, which are read afterwards."""
    from megatron.engine.build import build_engine
    from megatron.model.build import build_model
    from megatron.objectives.build import build_objective

    config = matrix.make_config({"train_micro_batch_size_per_gpu": 2, **keys}, world_size)
    mesh = matrix.make_mesh(config)
    engine = build_engine(config, mesh, model=build_model(config, matrix.VOCAB, mesh), objective=build_objective())
    batches = [matrix.micro_batches(config, batch, mesh) for batch in matrix.make_batches(config)]
    pending: list[Any] = []
    wishes = [{Wish.SAVE}, set(), {Wish.SIGUSR1, Wish.SLURM_END} if mesh.world.rank == 0 else {Wish.SIGTERM}]

    def steps() -> None:
        pending.extend(engine.queue_step(batches[step], step, partial(wishes.__getitem__, step)) for step in range(3))

    return reads(steps), [step.read() for step in pending]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_reads_nothing(precision: str, dropout: float, world_size: int) -> None:
    """With clipping and accumulation: 8 sequences of a step are 4 micro-batches of 2 on one rank, 2 on each of two."""
    keys = {"precision": precision, "hidden_dropout": dropout, "attention_dropout": dropout}
    for found, results in run_ranks(world_size, lambda: reads_of_steps(world_size, **keys)):
        assert not found
        last = {Wish.SIGUSR1, Wish.SLURM_END} | ({Wish.SIGTERM} if world_size > 1 else set())
        assert [result.wishes for result in results] == [{Wish.SAVE}, set(), last]
        assert all(result.num_tokens > 0 and result.loss > 1 for result in results)
        assert precision == "fp16" or any(result.clipped_grad_norm < result.grad_norm for result in results)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lion": {},
    "madgrad_wd": {},
    "sm3": {"momentum": 0.9},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_optimizer_makes_a_step_wait(kind: str, precision: str) -> None:
    optimizer = {"type": kind, "params": {"lr": 1e-3, **OPTIMIZERS[kind]}}
    ((found, results),) = run_ranks(1, lambda: reads_of_steps(1, optimizer=optimizer, precision=precision))
    assert not found
    assert results[0].grad_norm > 0


@pytest.mark.parametrize("kind", ["adam", "lion"])
def test_updates_in_the_backward_pass_read_nothing(kind: str) -> None:
    keys = {"optimizer_in_backward": True, "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 8}
    optimizer = {"type": kind, "params": {"lr": 1e-3}}
    ((found, results),) = run_ranks(1, lambda: reads_of_steps(1, optimizer=optimizer, precision="bf16", **keys))
    assert not found
    assert results[0].grad_norm > 0


def test_the_count_can_fail() -> None:
    """Reads of all sorts are counted."""
    value = torch.ones(2)
    for read in (value.sum().item, value.tolist, lambda: bool(value.sum() > 0), value.nonzero, value.numpy):
        assert reads(read)


def test_what_is_queued_is_not_changed_by_later_steps() -> None:
    """Results that are read late are those of their own step."""

    def train(late: bool) -> list[Any]:
        config = matrix.make_config({"precision": "bf16", "train_micro_batch_size_per_gpu": 4})
        engine, batches = matrix_engine(config)
        if not late:
            return [engine.train_step(batch, step) for step, batch in enumerate(batches)]
        pending = [engine.queue_step(batch, step) for step, batch in enumerate(batches)]
        return [step.read() for step in pending]

    def matrix_engine(config: Any) -> tuple[Any, list[Any]]:
        from megatron.engine.build import build_engine
        from megatron.model.build import build_model
        from megatron.objectives.build import build_objective

        mesh = matrix.make_mesh(config)
        engine = build_engine(config, mesh, build_model(config, matrix.VOCAB, mesh), build_objective())
        return engine, [matrix.micro_batches(config, batch, mesh) for batch in matrix.make_batches(config)]

    assert run_ranks(1, lambda: train(True)) == run_ranks(1, lambda: train(False))
