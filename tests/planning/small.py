"""Small models to measure, and what is counted of them: live tensors by storage, bytes handed to collectives."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.batch import Batch

VOCAB = 128
BUCKET = 40_002
"""Elements of the reduce bucket; no tensor has its size, so that it can be told from gradients."""


def config(world_size: int = 1, stage: int = 0, persistence: int = 0, **keys: Any) -> Config:
    """Return the config of a small model; persistence: elements of the largest tensor that ZeRO 3 never shards."""
    values = {
        "num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32,
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "precision": "bf16", "pos_emb": "rotary",
        "no_weight_tying": True, "optimizer": {"type": "adam", "params": {"lr": 1e-3}}, "train_iters": 10,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET,
                              "stage3_param_persistence_threshold": persistence},
        **keys,
    }  # fmt: skip
    return resolve(values, world_size=world_size)


def batch(config: Config) -> Batch:
    rows, length = config.batch.train_micro_batch_size_per_gpu, config.model.seq_length
    text = torch.randint(0, VOCAB, (rows, length + 1))
    return Batch(text[:, :-1], text[:, 1:], torch.ones(rows, length))


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Return {address: bytes} of the storages of some tensors."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live(model: nn.Module) -> dict[int, int]:
    """Return the storages of the tensors made since `gc.freeze()`, gradients that only C++ holds included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    gradients = [getattr(parameter, name, None) for parameter in model.parameters() for name in ("grad", "grad_accum")]
    return storages([*tensors, *gradients])


def settled(model: nn.Module) -> dict[int, int]:
    """Return what is `live` once it stays so: the thread of a collective lets its tensors go a moment later."""
    now = live(model)
    for _ in range(20):
        time.sleep(0.005)
        before, now = now, live(model)
        if now == before:
            break
    return now


class Collectives(TorchDispatchMode):
    """Counts the bytes handed to each kind of collective: the whole tensor, on whichever side of it that is."""

    _KINDS = ("allreduce", "allgather", "reduce_scatter", "broadcast", "reduce_")

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next((kind for kind in self._KINDS if kind in func._schema.name), func._schema.name)
            self.payload[kind] += max((_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, (list, tuple)):
        return sum(_bytes(item) for item in argument)
    return 0
