"""Trains the real model in a layout and in one process, and compares them: losses, norms, every gradient, weights.

    reference = run_reference(flat)                       # one process, our own engine
    trace = run_layout(flat, world_size=4)                # forks 4 gloo ranks and lays `flat` over them
    assert_equal(trace, reference, rtol=1e-5)

`flat` are YAML keys on top of `SMALL`; `train_batch_size` is the global batch, which every layout shares out.
`train_reference` and `train_layout` are what runs inside the ranks. Full tensors are assembled from all ranks by
ShardSpec (gradients) and StatePiece (weights); replicas must agree bit by bit.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import preload, run_ranks

preload()
from megatron.config.resolve import resolve  # noqa: E402
from megatron.config.schema.config import Config  # noqa: E402
from megatron.data.batch import Batch  # noqa: E402
from megatron.engine.build import build_engine  # noqa: E402
from megatron.model.build import build_model  # noqa: E402
from megatron.objectives.build import build_objective  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.parallel.sharding import ShardSpec, get_spec, merge  # noqa: E402
from tests.engine import tiny  # noqa: E402

VOCAB, STEPS = 48, 5

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 12,
    "max_position_embeddings": 12,
    "precision": "fp32",
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "train_batch_size": 8,
    "optimizer": {"type": "adam", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-5}},
    "gradient_clipping": 0.5,
    "train_iters": 20,
    "warmup": 0.1,
}


@dataclass(frozen=True)
class Trace:
    """What a run of STEPS steps did; lists have one entry for each step.

    grad_norms: before clipping; clipped: after. gradients: full and unclipped, by canonical name. weights: full, at
    the end; evaluation: (summed loss, tokens) of one more batch.
    """

    losses: list[float]
    grad_norms: list[float]
    clipped: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    evaluation: tuple[float, int]


def make_config(flat: dict[str, Any], world_size: int = 1) -> Config:
    """Return the Config of SMALL with `flat` on top; `stage` is short for the ZeRO stage."""
    keys = {**SMALL, **flat}
    zero = {"stage": keys.pop("stage", 0), "stage3_param_persistence_threshold": 50}
    engine = "deepspeed" if zero["stage"] else "auto"
    return resolve({"zero_optimization": zero, "engine": engine, **keys}, world_size=world_size)


def make_batches(config: Config, steps: int = STEPS + 1, segments: bool = False) -> list[Batch]:
    """Return the global batch of each step, with masks of very different lengths; the same on every rank.

    segments: with two documents in each row."""
    rows, length = SMALL["train_batch_size"], config.model.seq_length
    batches = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(500 + step)
        text = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
        documents = (torch.arange(length)[None] > lengths // 2).long() if segments else None
        mask = (torch.arange(length)[None] < lengths).float()
        batches.append(Batch(text[:, :-1], text[:, 1:], mask, documents))
    return batches


def make_mesh(config: Config) -> Mesh:
    """Return the mesh of the config on the ranks that exist."""
    parallel = config.parallel
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Mesh.single()
    sizes = {"tp": parallel.model_parallel_size, "pp": max(1, parallel.pipe_parallel_size)}
    if hasattr(parallel, "context_parallel_size"):
        sizes["cp"] = parallel.context_parallel_size
    return Mesh.create(**sizes, device="cpu")


def micro_batches(config: Config, batch: Batch, mesh: Mesh) -> list[Batch]:
    """Return this rank's micro-batches: micro-batch i of data rank r holds rows (i * dp + r) * size and on."""
    size = config.batch.train_micro_batch_size_per_gpu
    starts = [(i * mesh.dp.size + mesh.dp.rank) * size for i in range(config.batch.gradient_accumulation_steps)]
    parts = [slice(start, start + size) for start in starts]
    return [
        Batch(*(None if field is None else field[p] for field in (batch.tokens, batch.labels, batch.loss_mask,
                                                                  batch.segments)))
        for p in parts
    ]  # fmt: skip


def train_reference(config: Config, batches: Sequence[Batch]) -> Trace:
    """Train in one process with our own engine; `batches`: one global batch a step, the last one for evaluation."""
    return train_layout(config, batches)


def train_layout(config: Config, batches: Sequence[Batch]) -> Trace:
    """Train on all ranks of the process group; every rank calls it with the same batches and gets the same Trace."""
    mesh = make_mesh(config)
    engine = build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective())
    captured = tiny.capture_gradients(engine)
    steps = len(batches) - 1
    results = [engine.train_step(micro_batches(config, batches[i], mesh), i) for i in range(steps)]
    evaluation = engine.evaluate(micro_batches(config, batches[-1], mesh))[:2]
    engine.check_masters()  # and that all copies of a tensor have the same bits
    specs = {name: get_spec(parameter) for name, parameter in engine.model.named_parameters()}
    return Trace(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        clipped=[result.clipped_grad_norm for result in results],
        gradients=_full_gradients(captured, specs, mesh),
        weights=full_weights(engine),
        evaluation=evaluation,
    )


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in order of rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _full_gradients(
    captured: list[dict[str, Tensor]], specs: dict[str, ShardSpec], mesh: Mesh
) -> list[dict[str, Tensor]]:
    ranks = gather((mesh.tp.rank, specs, captured))
    steps = []
    for step in range(len(captured)):
        shares: dict[str, dict[int, Tensor]] = {}
        found: dict[str, ShardSpec] = {}
        for tp_rank, rank_specs, gradients in ranks:
            for name, gradient in gradients[step].items():
                found[name] = rank_specs[name]
                coordinate = 0 if rank_specs[name].dim is None else tp_rank
                first = shares.setdefault(name, {}).setdefault(coordinate, gradient)
                if first is not gradient:  # a replica; compared loosely, since each may be a sum in another order
                    torch.testing.assert_close(gradient, first, rtol=1e-5, atol=1e-6, msg=f"replicas of {name} differ")
        steps.append({name: merge([s[r] for r in sorted(s)], found[name]) for name, s in shares.items()})
    return steps


def full_state(engine: Any) -> dict[tuple[str, str], Tensor]:
    """Return every tensor of the engine's state, full, by (kind, name); every element must have exactly one owner."""
    mine = [
        (p.name, p.kind, p.shape, p.start, p.data.detach().cpu().clone(), p.shard, p.spec)
        for p in engine.state_pieces()
    ]
    shares: dict[tuple[str, str], dict[int, Tensor]] = {}
    owners: dict[tuple[str, str], dict[int, Tensor]] = {}
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], ShardSpec, int]] = {}
    for name, kind, shape, start, data, (rank, size), spec in (piece for pieces in gather(mine) for piece in pieces):
        key = (kind, name)
        shapes[key] = (shape, spec, size)
        numel = math.prod(shape)
        share = shares.setdefault(key, {}).setdefault(rank, torch.empty(numel, dtype=data.dtype))
        count = owners.setdefault(key, {}).setdefault(rank, torch.zeros(numel))
        share[start : start + data.numel()] = data
        count[start : start + data.numel()] += 1
    full = {}
    for key, (shape, spec, size) in shapes.items():
        assert sorted(shares[key]) == list(range(size)), (key, sorted(shares[key]))
        assert all((count == 1).all() for count in owners[key].values()), f"{key} has not one owner"
        full[key] = merge([shares[key][rank].view(shape) for rank in range(size)], spec)
    return full


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Return the full weights by canonical name, in fp32."""
    return {name: tensor.float() for (kind, name), tensor in full_state(engine).items() if kind == "weight"}


def _rank(flat: dict[str, Any], world_size: int, segments: bool) -> Trace | None:
    config = make_config(flat, world_size)
    trace = train_layout(config, make_batches(config, segments=segments))
    return trace if not dist.is_initialized() or dist.get_rank() == 0 else None


def run_layout(flat: dict[str, Any], world_size: int, segments: bool = False) -> Trace:
    """Train `flat` on forked ranks and return rank 0's Trace."""
    return run_ranks(world_size, _rank, flat, world_size, segments)[0]


def run_reference(flat: dict[str, Any], segments: bool = False) -> Trace:
    """Train `flat` in one process, at tensor, pipeline and context size 1 and ZeRO stage 0; cached.

    One micro-batch holds the whole batch, unless `flat` says otherwise."""
    layout = {
        "model_parallel_size", "pipe_parallel_size", "context_parallel_size", "sequence_parallel", "stage",
        "gradient_accumulation_steps", "checkpoint_activations", "train_micro_batch_size_per_gpu", "fp32_allreduce",
    }  # fmt: skip
    return _reference(json.dumps({k: v for k, v in flat.items() if k not in layout}, sort_keys=True), segments)


@functools.cache
def _reference(flat: str, segments: bool) -> Trace:
    return run_ranks(1, _rank, json.loads(flat), 1, segments)[0]


def assert_equal(trace: Trace, reference: Trace, rtol: float) -> None:
    """Compare two runs: norms and losses relative, tensors by the norm of their difference.

    A key's bias has no gradient but rounding, so a gradient is measured against a hundredth of the whole too.
    """
    errors: list[str] = []
    for field in ("losses", "grad_norms", "clipped"):
        for step, (ours, theirs) in enumerate(zip(getattr(trace, field), getattr(reference, field), strict=True)):
            if not math.isclose(ours, theirs, rel_tol=rtol):
                errors.append(f"{field}[{step}] = {ours}, not {theirs}: off by {abs(ours / theirs - 1):.1e}")
    for step, (ours, theirs) in enumerate(zip(trace.gradients, reference.gradients, strict=True)):
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        for name, gradient in theirs.items():
            error = float((ours[name] - gradient).norm() / (gradient.norm() + 1e-2 * whole))
            if not error < rtol:
                errors.append(f"gradient of {name} at step {step}: off by {error:.1e}")
    assert trace.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        if name.endswith("query_key_value.bias"):
            continue  # Adam blows the rounding of a key bias's gradient up
        error = float((trace.weights[name] - weight).norm() / weight.norm().clamp(min=1))
        if not error < 10 * rtol:
            errors.append(f"final {name}: off by {error:.1e}")
    if not math.isclose(trace.evaluation[0], reference.evaluation[0], rel_tol=rtol):
        errors.append(f"evaluation {trace.evaluation}, not {reference.evaluation}")
    assert trace.evaluation[1] == reference.evaluation[1]
    assert not errors, "\n".join(errors[:20])
