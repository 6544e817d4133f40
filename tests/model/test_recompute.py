"""Recomputed activations: the same gradients bit by bit, with dropout, from less memory and no more work than said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.resolve import resolve
from megatron.model.build import build_model
from megatron.model.recompute import Recompute
from megatron.ops import linear
from megatron.parallel.mesh import Mesh

VOCAB = 40
ON = {"checkpoint_activations": True}
KINDS: dict[str, dict[str, Any]] = {
    "blocks": ON,
    "pairs of blocks": {**ON, "checkpoint_num_layers": 2},
    "the first blocks": {**ON, "checkpoint_first_layers": 2},
    "norm": {**ON, "checkpoint_operations": ["norm"]},
    "attention": {**ON, "checkpoint_operations": ["attention"]},
    "activation": {**ON, "checkpoint_operations": ["activation"]},
    "all": {**ON, "checkpoint_operations": ["norm", "activation", "attention"]},
    "activation of the first block": {**ON, "checkpoint_operations": ["activation"], "checkpoint_first_layers": 1},
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"pos_emb": "learned", "no_weight_tying": False},
    "gpt-j": {"gpt_j_residual": True, "gpt_j_tied": True, "norm": "scalenorm"},
    "pythia": {"gpt_j_residual": True},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "pos_emb": "rotary"},
    "rpe": {"pos_emb": "rpe"},
}


class Products(TorchDispatchMode):
    """Counts products of matrices with weights, forward and backward."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return operation(*args, **(kwargs or {}))


def run(**keys: Any) -> tuple[dict[str, Tensor], int, int]:
    """Return gradients, bytes kept for the backward pass, and the number of products with weights."""
    model_keys = {
        "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "max_position_embeddings": 16,
        "hidden_dropout": 0.1, "attention_dropout": 0.2, "precision": "fp32", "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "adam", "params": {"lr": 1e-3}},
    }  # fmt: skip
    model = build_model(resolve({**model_keys, **keys}), VOCAB, Mesh.single())
    text = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    torch.manual_seed(0)
    with Products() as products:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(2, 16))
        size = sum(nbytes for address, nbytes in kept.items() if address not in weights)
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, size, products.count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_gradient_and_keeps_less(name, kind):
    plain, plain_size, plain_products = run(**MODELS[name])
    gradients, size, products = run(**MODELS[name], **KINDS[kind])
    for parameter, gradient in plain.items():
        assert torch.equal(gradients[parameter], gradient), parameter
    assert size < plain_size
    if "checkpoint_operations" in KINDS[kind]:
        assert products == plain_products
    else:
        assert products > plain_products


def test_less_is_kept_the_more_is_recomputed():
    sizes = {kind: run(**MODELS["gpt2"], **KINDS[kind])[1] for kind in KINDS}
    assert sizes["blocks"] < sizes["the first blocks"] < sizes["all"]
    assert sizes["all"] < sizes["attention"]
    assert sizes["all"] < sizes["activation"] < sizes["activation of the first block"]


def test_large_products_of_a_function_of_our_own_are_not_repeated(monkeypatch):
    """Such a function keeps its inputs when it has returned: whoever runs it again multiplies again."""
    monkeypatch.setattr(linear, "_is_faster_by_onednn", lambda left, right: left.dtype == torch.float32)
    calls: list[int] = []
    multiply = linear._by_onednn
    monkeypatch.setattr(linear, "_by_onednn", lambda *args: (calls.append(1), multiply(*args))[1])
    counts = []
    for keys in ({}, KINDS["norm"], KINDS["activation"], KINDS["all"]):
        calls.clear()
        run(**MODELS["pythia"], **keys)
        counts.append(len(calls))
    assert counts[0] > 0
    assert counts == [counts[0]] * 4


def test_blocks_are_chunked_from_the_first_of_a_stage():
    names = ["embedding.word_embeddings", *(f"layers.{i}" for i in range(5)), "final_norm", "head"]

    def chunks(span: range, **settings: int) -> list[tuple[int, int, bool]]:
        found = Recompute(**settings).chunks(names, span)
        return [(chunk.layers.start, chunk.layers.stop, chunk.recomputed) for chunk in found]

    assert chunks(range(1, 7), together=2) == [(1, 3, True), (3, 5, True), (5, 6, True), (6, 7, False)]
    assert chunks(range(3, 7), together=2) == [(3, 5, True), (5, 6, True), (6, 7, False)]
    assert chunks(range(1, 5), together=2, first=3) == [(1, 3, True), (3, 4, True), (4, 5, False)]
    assert chunks(range(1, 3)) == [(1, 2, False), (2, 3, False)]
