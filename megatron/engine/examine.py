"""Where a number that is not finite comes from: a step done again, with hooks, that changes nothing.

    examination = engine.examine(batches, iteration)        # every rank must call it

The forward and backward passes, the sums over ranks and the optimizer's look at the norm are those of a step, under
limits that let nothing through, so this works in every engine, and no rank leaves a collective out. A step that is
not examined has no hooks and pays nothing. Each rank notes what it sees; then all put it together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.engine.examination import Examination, Seen, put_together
from megatron.engine.fragments import Fragment
from megatron.parallel.agreement import gathered
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import get_spec
from megatron.whereabouts import current

MOST_NOTED = 50
"""Places that a rank notes of each sort: behind the first, all that follows is spoilt as well."""


@dataclass
class Examiner:
    """Notes what one rank sees of one step."""

    model: nn.Module
    mesh: Mesh
    seen: Seen = field(init=False)
    looks: int = 0

    def __post_init__(self) -> None:
        axes = {name: getattr(self.mesh, name).rank for name in ("dp", "cp", "tp", "pp")}
        order = [name for name, _ in self.model.named_parameters()]
        split = [name for name, p in self.model.named_parameters() if get_spec(p).dim is not None]
        self.seen = Seen(self.mesh.world.rank, axes, order, split)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the block every module of the model tells what it returns, and the gradient of that."""
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in self.model.named_modules() if name
        ]
        handles += [module.register_forward_pre_hook(self._inputs(name)) for name, module in self._leaves()]
        try:
            with _eager():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def look_at_weights(self, held: Iterable[Fragment]) -> None:
        """Note which weights and masters of this rank are not finite."""
        for fragment in held:
            if not (_is_finite(fragment.weight) and _is_finite(fragment.master)):
                self.seen.parameters.append(fragment.name)

    def take_gradient(self, name: str, gradient: Tensor) -> None:
        """Note a reduced gradient: its square, and whether it is finite; see `WatchGradient`."""
        self.seen.squares[name] = float(gradient.double().square().sum())

    def take_loss(self, micro_batch: int, loss_sum: Tensor, num_tokens: Tensor) -> None:
        """Note the sum of a micro-batch's losses on this rank, and its trained tokens."""
        self.seen.losses[micro_batch] = float(loss_sum)
        self.seen.tokens[micro_batch] = float(num_tokens)

    def conclude(self) -> Examination:
        """Return what all ranks saw; every rank must call it."""
        return put_together(gathered(self.seen, self.mesh.world))

    def _leaves(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, module) for name, module in self.model.named_modules() if name and not any(module.children()))

    def _inputs(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._look(self.seen.activations, inputs, f"input of {name}")

        return look

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._look(self.seen.activations, outputs, f"output of {name}")
            for tensor in _tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient(name))

        return look

    def _gradient(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            self._look(self.seen.gradients, gradient, f"output of {name}")

        return look

    def _look(self, notes: list[tuple[int, int, str]], values: Any, place: str) -> None:
        """Note the place if one of the values is not finite. Ranks that share a layer look as often as each other."""
        self.looks += 1
        if len(notes) < MOST_NOTED and not all(_is_finite(tensor) for tensor in _tensors(values)):
            micro_batch = current().micro_batch
            notes.append((-1 if micro_batch is None else micro_batch, self.looks, place))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _eager() -> Any:
    """Return what keeps compiled blocks from being used, which call no hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
