"""A small model, ragged batches and a plain torch loop, which the engines must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.build import build_engine
from megatron.engine.local import LocalEngine
from megatron.engine.pipeline import PipelineEngine
from megatron.optim.schedules import learning_rate
from megatron.parallel.mesh import Mesh

VOCAB, HIDDEN, SEQUENCE = 37, 20, 9


class TinyModel(nn.Module):
    """Embedding, a gated residual layer with a norm and biases, and a tied head: odd shapes, two sorts of groups."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 3 * HIDDEN + 1)
        self.down = nn.Linear(3 * HIDDEN + 1, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        logits = self.head(hidden.cumsum(dim=1) / 3)
        return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")


def objective(model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    losses = model(batch.tokens, labels=batch.labels)
    return (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()


def config(world_size: int = 1, **keys: Any) -> Config:
    stage = keys.pop("stage", 0)
    values = {
        "num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE, "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}},
        "gradient_clipping": 0.3, "weight_decay": 0.1, "train_iters": 20, "warmup": 0.1, "lr_decay_style": "cosine",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 30},
        "engine": "deepspeed" if stage else "auto",
        **keys,
    }  # fmt: skip
    return resolve(values, world_size=world_size)


def global_batch(iteration: int, sequences: int) -> Batch:
    """Return sequences with masks of very different lengths, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + iteration)
    text = torch.randint(0, VOCAB, (sequences, SEQUENCE + 1), generator=generator)
    lengths = torch.randint(1, SEQUENCE + 1, (sequences, 1), generator=generator)
    mask = (torch.arange(SEQUENCE)[None] < lengths).float()
    return Batch(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=mask)


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(batch.tokens[start:stop], batch.labels[start:stop], batch.loss_mask[start:stop])


def micro_batches(config: Config, iteration: int, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches: micro-batch i of rank r holds rows (i * dp + r) * size and on."""
    size = config.batch.train_micro_batch_size_per_gpu
    batch = global_batch(iteration, config.batch.train_batch_size)
    starts = [(i * mesh.dp.size + mesh.dp.rank) * size for i in range(config.batch.gradient_accumulation_steps)]
    return [rows(batch, start, start + size) for start in starts]


def make_engine(config: Config, model: nn.Module | None = None) -> Any:
    """Return a fresh engine on the ranks that exist, or on one process."""
    mesh = Mesh.create() if dist.is_initialized() and dist.get_world_size() > 1 else Mesh.single()
    return build_engine(config, mesh, model or TinyModel(), objective)


def train(engine: Any, config: Config, first: int, last: int) -> list[Any]:
    return [engine.train_step(micro_batches(config, i, engine._mesh), i) for i in range(first, last)]


def capture_gradients(engine: Any) -> list[dict[str, Tensor]]:
    """Record the full reduced gradient of every parameter just before each optimizer step, unclipped."""
    record: list[dict[str, Tensor]] = []
    if isinstance(engine, LocalEngine):
        reduced = engine._reduced

        def recording_reduced() -> list[Tensor]:
            gradients = reduced()
            record.append({name: gradient.float().clone() for name, gradient in engine._named_gradients()})
            return gradients

        engine._reduced = recording_reduced
        return record
    live = engine._live
    name = "_take_model_step" if isinstance(engine, PipelineEngine) else "step"
    step = getattr(live, name)

    def recording_step(*settings: Any) -> None:
        if live.is_gradient_accumulation_boundary():
            record.append({n: safe_get_full_grad(p).float().clone() for n, p in engine.model.named_parameters()})
        step(*settings)

    setattr(live, name, recording_step)
    return record


def reference(config: Config, iterations: int, dtype: torch.dtype = torch.float32) -> tuple[list, list, dict]:
    """A plain AdamW loop over the whole global batch in one process: (losses, [(norm, gradients)], weights).

    In bf16 the forward and backward passes are in bf16, one micro-batch after another as the ranks have them;
    gradients are summed, and weights kept, in fp32."""
    model = TinyModel().to(dtype)
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in model.named_parameters()}
    decay = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in masters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        **config.optimizer.optimizer["params"],
    )
    size = config.batch.train_micro_batch_size_per_gpu
    losses, gradients = [], []
    for iteration in range(iterations):
        batch = global_batch(iteration, config.batch.train_batch_size)
        tokens, total = batch.loss_mask.sum(), 0.0
        optimizer.zero_grad()
        for start in range(0, config.batch.train_batch_size, size):
            loss_sum, _ = objective(model, rows(batch, start, start + size))
            (loss_sum / tokens).backward()
            total += loss_sum.item()
            for name, parameter in model.named_parameters():
                grad = parameter.grad.float()
                masters[name].grad = grad if masters[name].grad is None else masters[name].grad + grad
            model.zero_grad()
        losses.append(total / tokens.item())
        record = {n: p.grad.clone() for n, p in masters.items()}
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), config.optimizer.gradient_clipping or 1e9)
        gradients.append((norm.item(), record))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, config.training.train_iters, iteration)
        optimizer.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name])
    return losses, gradients, {n: p.detach().clone() for n, p in masters.items()}


def full_state(engine: Any) -> list[tuple]:
    """Return this rank's pieces as plain values that can be sent to the parent."""
    return [(p.name, p.kind, p.shape, p.start, p.data.detach().cpu().clone()) for p in engine.state_pieces()]


def merge(ranks: list[list[tuple]]) -> dict[tuple[str, str], Tensor]:
    """Assemble full tensors of the pieces of all ranks; every element must have exactly one owner."""
    full: dict[tuple[str, str], Tensor] = {}
    owners: dict[tuple[str, str], Tensor] = {}
    for name, kind, shape, start, data in (piece for pieces in ranks for piece in pieces):
        numel = max(1, math.prod(shape))
        tensor = full.setdefault((name, kind), torch.empty(numel, dtype=data.dtype))
        count = owners.setdefault((name, kind), torch.zeros(numel))
        tensor[start : start + data.numel()] = data
        count[start : start + data.numel()] += 1
        full[name, kind] = tensor
    shapes = {(name, kind): shape for pieces in ranks for name, kind, shape, _, _ in pieces}
    assert all((count == 1).all() for count in owners.values())
    return {key: tensor.view(shapes[key]) for key, tensor in full.items()}
