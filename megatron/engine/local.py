"""An engine of our own for ZeRO stage 0: every rank holds the whole model, and a step never waits for the device.

Norm, clipping, the choice to skip a step and the loss scale stay on the device, with every optimizer
(`optim/one_pass.py`, `optim/where.py`).

It is plain data parallelism in fp32: gradients are summed over micro-batches and ranks in one flat fp32 buffer,
masters are fp32, and every rank applies the same update. There is no buffer where autograd's own gradients are that
sum: on one rank in fp32, or, of one micro-batch, in the weights' dtype, which AdamW converts as it reads them. It hands
the optimizer whole tensors, so optimizers that need rows and columns run here.
Under tensor parallelism each rank does this with its share; gradients that are partial are summed once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.config.schema.config import Config
from megatron.engine import restore, state, verify
from megatron.engine.base import StateSource
from megatron.engine.fragments import Fragment, Holdings
from megatron.engine.loss_scale import LossScale
from megatron.engine.pending import Number
from megatron.engine.step import MicroBatchEngine, Update
from megatron.engine.verdict import Verdict
from megatron.objectives.build import Objective
from megatron.ops.accumulate import accumulate
from megatron.ops.adamw import coefficient_of, sum_of_squares
from megatron.ops.choice import Function, Situation
from megatron.optim.one_pass import one_pass
from megatron.optim.where import step_where
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.grad_sync import is_partial
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece, get_spec

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LocalEngine(MicroBatchEngine):
    """The Engine of ZeRO stage 0; `engine.build.build_engine` makes it.

    optimizer: over the model's parameters; it is given the fp32 masters instead.
    """

    def __init__(
        self, config: Config, mesh: Mesh, model: nn.Module, optimizer: Optimizer, objective: Objective
    ) -> None:
        super().__init__(config, mesh, objective)
        self._model = _cast(model, _TYPES[config.numerics.weight_precision], mesh)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {name: _master(p) for name, p in self._trained.items()}
        self._optimizer = optimizer
        self._give_masters()
        self._clip = float(config.optimizer.gradient_clipping)
        situation = Situation(mesh.device, _TYPES[config.numerics.weight_precision], config.model.hidden_size)
        self._one_pass = one_pass(config, optimizer, self._rounded(), situation)
        region = TensorRegion(mesh.tp, config.parallel.sequence_parallel)
        self._gradients = None if self._is_direct() else GradientBuffer(self._trained, self._masters, mesh, region)
        self._scaler = (
            LossScale(config.deepspeed.fp16 or {}, mesh.device) if config.numerics.precision == "fp16" else None
        )
        state.make_states(self._holdings())

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield this rank's share of the state, as views of the live tensors; save or copy them before a step."""
        return state.pieces(self._holdings(), self._mesh)

    def load_state(self, source: StateSource, with_optimizer: bool) -> None:
        """Fill masters and optimizer state, then the weights from the masters; see `Engine.load_state`."""
        restore.load(self._holdings(), self._mesh, source, with_optimizer)
        self._publish()
        self.check_masters()

    def read_back(self) -> dict[str, Any]:
        """Return what the live engine does, under the names of the keys that asked for it; all ranks must call it."""
        size, dp = self._config.batch.train_micro_batch_size_per_gpu, self._mesh.dp.size  # cp ranks share sequences
        # Autograd's own gradients are sums in fp32, or of one micro-batch, which nothing is added to.
        sums = "fp32" if self._gradients is None else verify.DTYPES[self._gradients.flat.dtype]
        return {
            "zero_optimization.stage": 0,
            "gradient_clipping": self._clip,
            "train_batch_size": size * self._num_micro_batches * dp,
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": self._num_micro_batches,
            "replicas of the parameters": self._mesh.replicas.size,
            "precision of accumulation": sums,
            "precision of communication": sums,
            "model_parallel_size": self._mesh.tp.size,
            "pipe_parallel_size": 1,
            "zero_optimization.offload_optimizer.device": "none",
            "zero_optimization.offload_param.device": "none",
            "learning rate schedule of DeepSpeed's": None,
            **verify.common_facts(self._holdings(), self._model, self._mesh),
        }

    def _is_direct(self) -> bool:
        """Return whether autograd's own gradients are the step's: on one rank, in fp32 or of one micro-batch."""
        if not self._mesh.replicas.size == self._mesh.tp.size == 1:
            return False
        is_read_as_it_is = self._num_micro_batches == 1 and self._one_pass is not None
        return is_read_as_it_is or self._config.numerics.weight_precision == "fp32"

    def _give_masters(self) -> None:
        masters = {id(self._trained[name]): master for name, master in self._masters.items()}
        for group in self._optimizer.param_groups:
            group["params"] = [masters[id(parameter)] for parameter in group["params"]]

    def _callable(self, training: bool) -> Callable[..., Tensor]:
        return self._model.train(training)

    def _start(self, rate: Number) -> Number:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._gradients is None:
            self._free_gradients()
        else:
            self._gradients.start()
        return self._scaler.cur_scale.clone() if self._scaler else 1.0  # of this step, whose update changes it

    def _loss_scale(self) -> Number:
        return self._scaler.cur_scale if self._scaler else 1.0

    def _backward(self, loss_sum: Tensor, num_tokens: Tensor) -> None:
        scale = self._loss_scale() / num_tokens
        (loss_sum * scale.to(loss_sum.dtype)).backward()

    @torch.no_grad()
    def _update(self, verdict: Verdict) -> Update:
        update = self._step_by(self._reduced(), verdict)
        if self._gradients is None:
            self._free_gradients()  # what comes between steps may use the memory
        return update

    def _free_gradients(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None

    @torch.no_grad()
    def _step_by(self, gradients: list[Tensor], verdict: Verdict) -> Update:
        """Apply the gradient of the whole step, as `_reduced` returns it, if the verdict allows."""
        scale = self._loss_scale()
        self._show_gradients(self._named_gradients(), scale)
        operation = sum_of_squares if self._one_pass is None else self._one_pass.squares
        squares = operation(gradients) if self._gradients is None else self._gradients.squares(operation)
        norm = squares.sqrt() / scale
        refused = verdict.refuses(norm)
        if self._one_pass is not None:
            self._one_pass.step(squares, scale, self._clip, refused)
        else:
            coefficient = coefficient_of(norm, scale, self._clip)
            step_where(self._optimizer, gradients, coefficient.masked_fill(refused, math.nan))
            self._publish()
        if self._scaler is None or self._examiner is not None:
            return Update(norm, refused)
        return Update(norm, refused, self._scaler.update(~torch.isfinite(norm)))

    def _reduced(self) -> list[Tensor]:
        """Return the gradient of the whole step, summed over the ranks, as one fp32 tensor or autograd's own."""
        if self._gradients is not None:
            return [self._gradients.reduce()]
        for parameter in self._trained.values():
            if parameter.grad is None:  # its weights decay, and its moments go on, as in every other layout
                parameter.grad = torch.zeros_like(parameter)
        return [gradient for _, gradient in self._named_gradients()]

    def _named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's gradient of the whole step, fp32 or in the weights' dtype."""
        for name, master in self._masters.items():
            gradient = self._trained[name].grad if master.grad is None else master.grad
            if gradient is not None:
                yield name, gradient

    def _publish(self) -> None:
        """Round the masters into the weights; in fp32 they are the same tensors."""
        pairs = [(p.data, self._masters[name]) for name, p in self._trained.items() if p is not self._masters[name]]
        if pairs:
            weights, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(weights), [master.detach() for master in masters])

    def _rounded(self) -> dict[int, Tensor]:
        """Return the weight that is rounded from each master, by the master's id; none in fp32."""
        named = self._trained.items()
        return {id(self._masters[name]): weight for name, weight in named if weight is not self._masters[name]}

    def _holdings(self) -> Holdings:
        groups = [(buffer, group) for group in self._optimizer.param_groups for buffer in group["params"]]
        held = [_fragment(name, p, self._masters[name], 0, p.numel()) for name, p in self._trained.items()]
        owned = [_share(whole, self._mesh.replicas.rank, self._mesh.replicas.size) for whole in held]
        return Holdings(
            optimizer=self._optimizer,
            buffers=groups,
            held=held,
            owned=[fragment for fragment in owned if fragment.numel],
            scaler=self._scaler if self._scaler and self._scaler.dynamic else None,
        )


class GradientBuffer:
    """The gradient of one step in one flat fp32 buffer, summed over micro-batches as the backward pass makes it.

    Each parameter's gradient is added and freed as soon as it is complete. The masters' `.grad` are views.
    In the buffer stand first the parameters that are split over the tensor axis, then those whose gradients are
    partial on each of its ranks, then the rest, so that each kind is one range.
    """

    def __init__(
        self, trained: dict[str, nn.Parameter], masters: dict[str, Tensor], mesh: Mesh, region: TensorRegion
    ) -> None:
        self._mesh = mesh
        self._region = region
        names = list(trained)
        kinds = {name: _kind(parameter, region) for name, parameter in trained.items()}
        trained = {name: trained[name] for name in sorted(trained, key=lambda name: kinds[name])}
        self._sizes = [sum(p.numel() for name, p in trained.items() if kinds[name] == kind) for kind in range(3)]
        self.flat = torch.zeros(sum(p.numel() for p in trained.values()), dtype=torch.float32, device=mesh.device)
        self._views: list[Tensor] = []  # one for each parameter, in the buffer's order
        self._written: list[bool] = []
        offset = 0
        for index, (name, parameter) in enumerate(trained.items()):
            view = self.flat.narrow(0, offset, parameter.numel()).view(parameter.shape)
            offset += parameter.numel()
            self._views.append(view)
            self._written.append(False)
            if masters[name] is not parameter:
                masters[name].grad = view
            parameter.register_post_accumulate_grad_hook(self._hook(index))
        places = {name: place for place, name in enumerate(trained)}
        self._in_order = [self._views[places[name]] for name in names]
        self._direct = [
            (p, view) for p, view in zip(trained.values(), self._views, strict=True) if p.dtype == view.dtype
        ]

    def start(self) -> None:
        """Forget the last step's gradient."""
        self._written = [False] * len(self._written)
        for parameter, _ in self._direct:
            parameter.grad = None

    def complete(self) -> None:
        """Set what no micro-batch has written to zero, so that all further ones are added."""
        for view, written in zip(self._views, self._written, strict=True):
            if not written:
                view.zero_()
        self.mark_complete()

    def mark_complete(self) -> None:
        """Say that everything is written, by work that was recorded when `complete` followed it."""
        self._written = [True] * len(self._written)

    def reduce(self) -> Tensor:
        """Return the flat gradient, summed over the replicas, and over the tensor axis where it is partial."""
        self.complete()
        partial = self.flat.split(self._sizes)[_PARTIAL]
        if partial.numel():
            dist.all_reduce(partial, group=self._mesh.tp.group)
        if self._mesh.replicas.size > 1:
            dist.all_reduce(self.flat, group=self._mesh.replicas.group)
        for parameter, view in self._direct:
            parameter.grad = view
        return self.flat

    def squares(self, operation: Function) -> Tensor:
        """Return the square of the norm of the whole model's gradient, in which replicated parameters count once, fp64.

        operation: what computes `megatron.ops.adamw.sum_of_squares`. On one rank it is given what it would be given
        without a buffer: both make the same number.
        """
        if not self._region.is_split:
            return operation(self._in_order)
        squares = torch.stack([operation([part]) for part in self.flat.split(self._sizes)])
        dist.all_reduce(squares[_SPLIT], group=self._mesh.tp.group)
        return squares.sum()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            accumulate(self._views[index], parameter.grad, is_first=not self._written[index])
            self._written[index] = True
            parameter.grad = None

        return add


_SPLIT, _PARTIAL, _WHOLE = range(3)


def _kind(parameter: nn.Parameter, region: TensorRegion) -> int:
    if get_spec(parameter).dim is not None:
        return _SPLIT
    return _PARTIAL if is_partial(parameter, region) else _WHOLE


def _cast(model: nn.Module, dtype: torch.dtype, mesh: Mesh) -> nn.Module:
    """Move the model to the device, cast its parameters (buffers keep their dtype), and take rank 0's weights."""
    model.to(mesh.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
        if mesh.replicas.size > 1:
            dist.broadcast(parameter.data, group=mesh.replicas.group, group_src=0)
    return model


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def _fragment(name: str, parameter: nn.Parameter, master: Tensor, start: int, numel: int) -> Fragment:
    return Fragment(
        name=name,
        parameter=parameter,
        shape=tuple(parameter.shape),
        start=start,
        numel=numel,
        weight=parameter.data.view(-1).narrow(0, start, numel),
        buffer=master,
        offset=start,
    )


def _share(whole: Fragment, rank: int, size: int) -> Fragment:
    """Return the part of a parameter that this of `size` ranks saves."""
    start, stop = whole.numel * rank // size, whole.numel * (rank + 1) // size
    return _fragment(whole.name, whole.parameter, whole.buffer, start, stop - start)
