"""What computes attention of each kind of layer: `attention_backend`, and the keys of the softmax of `dense`.

The kinds of a model follow from its config: windows of its local layers, alibi or learned biases, and dropout; whether
rows hold documents that do not see each other is known only of a batch, so on a GPU both are chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from megatron.config.schema.config import Config
from megatron.model.accounting import layer_types
from megatron.ops.attention import attention, first_of
from megatron.ops.attention_backend import Attend, Backend
from megatron.ops.attention_dense import dense_with
from megatron.ops.attention_operation import attention_operation
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Choices, Operation, Situation, choose
from megatron.ops.measured import fastest
from megatron.ops.partial_attention import PartKernels
from megatron.ops.softmax import masked_softmax

_CAUSAL, _LIMITED = "masked_softmax", "masked_softmax within limits"


def operations(config: Config, documents: bool = False) -> dict[str, Operation]:
    """Return attention of each layer type, as an operation of its own. documents: where a token sees its own only."""
    model = config.model
    always = {
        "alibi": model.pos_emb == "alibi",
        "bias": model.pos_emb == "rpe",
        "dropout": config.numerics.attention_dropout > 0,
        "documents": documents,
    }
    features = [feature for feature, has in always.items() if has]
    types = set(layer_types(model))
    windowed = {"local"} if "local" in types else types if model.sliding_window_width is not None else set()
    return {
        kind: attention_operation([*features, "window"] if kind in windowed else features) for kind in sorted(types)
    }


def choose_attention(config: Config, device: torch.device, dtype: torch.dtype) -> Choices:
    """Return what computes each kind of attention, and the softmax of `dense` where that does."""
    model, kernels = config.model, config.kernels
    head = Situation(device, dtype, model.hidden_size // model.num_attention_heads, model.seq_length)
    kinds = [*operations(config).values(), *(operations(config, True).values() if device.type == "cuda" else ())]
    asked = {operation.name: kernels.attention_backend for operation in kinds}
    chosen = choose(asked, head, {operation.name: operation for operation in kinds}, fastest)
    if all(choice.candidate != "dense" for choice in chosen.choices):
        return chosen
    softmax = CATALOGUE["masked_softmax"]
    wishes = {
        _CAUSAL: kernels.scaled_upper_triang_masked_softmax_fusion,
        _LIMITED: kernels.scaled_masked_softmax_fusion,
    }
    softmaxes = choose(wishes, head, {name: replace(softmax, name=name) for name in wishes}, fastest)
    return Choices((*chosen.choices, *softmaxes.choices))


def attend(config: Config, kind: str, choices: Choices) -> Attend:
    """Return what computes attention of a layer type: what was chosen, where it can, and PyTorch's where not."""
    plain, documents = _backends(config, kind, choices)
    was_chosen = choices.get(operations(config, True)[kind].name, plain) is not plain
    return first_of(plain, documents) if was_chosen else first_of(plain)


def part_kernels(config: Config, kind: str, choices: Choices) -> PartKernels:
    """Return what computes parts of that attention: the chosen back end where it can, else PyTorch's or the formula."""
    return PartKernels(*(backend.parts for backend in _backends(config, kind, choices)))


def _backends(config: Config, kind: str, choices: Choices) -> list[Backend]:
    """Return what was chosen for rows of one document, and of several."""
    names = [operations(config, documents)[kind].name for documents in (False, True)]
    chosen = [cast(Backend, choices.get(name, attention)) for name in names]
    dense = dense_with(choices.get(_CAUSAL, masked_softmax), choices.get(_LIMITED, masked_softmax))
    return [dense if backend.name == dense.name else backend for backend in chosen]
