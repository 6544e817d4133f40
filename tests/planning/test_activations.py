"""Predicted bytes against what autograd really keeps, by storage, for every kind of block."""

import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron.model import recompute
from megatron.model.build import build_model
from megatron.model.stream import Stream
from megatron.ops import cross_entropy
from megatron.parallel.mesh import Mesh
from megatron.planning.activations import CHUNK_BYTES, block_bytes, boundary_bytes, loss_bytes
from megatron.planning.layout import Layout
from tests.parallel.matrix import make_mesh
from tests.planning.small import VOCAB, batch, config, live, storages
from tests.ranks import run_ranks

BLOCKS = {
    "GPT-NeoX": {"gpt_j_residual": True, "rotary_pct": 0.25},
    "GPT-J": {"gpt_j_residual": True, "gpt_j_tied": True},
    "GPT-2": {"pos_emb": "learned"},
    "LLaMA": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2},
    "LLaMA fp32": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "precision": "fp32"},
    "groups without rotary": {"pos_emb": "none", "num_kv_heads": 2},
    "one key for all": {"num_kv_heads": 1},
    "norms without rotary": {"use_qk_layernorm": True, "pos_emb": "none"},
    "norms of queries and keys": {"use_qk_layernorm": True},
    "norms of queries and keys in groups": {"use_qk_layernorm": True, "num_kv_heads": 2},
    "scalenorm, relu": {"pos_emb": "none", "norm": "scalenorm", "activation": "relu"},
    "softsign": {"pos_emb": "none", "activation": "softsign"},
    "bilinear": {"pos_emb": "none", "activation": "bilinear", "precision": "fp32"},
    "GPT-NeoX fp8": {"gpt_j_residual": True, "rotary_pct": 0.25, "precision": "fp8"},
    "GPT-J fp8": {"gpt_j_residual": True, "gpt_j_tied": True, "precision": "fp8"},
    "LLaMA fp8": {"norm": "rmsnorm", "activation": "swiglu", "mlp_multiple_of": 16, "precision": "fp8"},
    "relu fp8": {"pos_emb": "none", "activation": "relu", "precision": "fp8"},
    "softsign fp8": {"pos_emb": "none", "activation": "softsign", "precision": "fp8"},
    "window": {"pos_emb": "none", "sliding_window_width": 8},
}


def _kept(function, model, starts=()):
    """Return the bytes that `function` keeps for its backward pass, parameters apart. starts: are kept as well."""
    found, tensors = {}, []

    def keep(tensor):
        tensors.append(tensor)  # alive, so that no other storage takes its address
        found.update(storages([tensor]))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    found.update(storages(starts))
    parameters = storages(model.parameters())
    return sum(size for address, size in found.items() if address not in parameters), result


def _config(processes=1, **keys):
    return config(processes, num_layers=2, hidden_size=64, seq_length=64, max_position_embeddings=64, **keys)


def _model(**keys):
    resolved = _config(**keys)
    return resolved, build_model(resolved, VOCAB, Mesh.single())


@pytest.mark.parametrize("keys", BLOCKS.values(), ids=BLOCKS)
def test_a_block_keeps_what_is_planned(keys):
    resolved, model = _model(**keys)
    dtype = next(model.parameters()).dtype
    hidden = torch.randn(2, 64, 64, dtype=dtype, requires_grad=True)
    measured, _ = _kept(lambda: model.get_submodule("layers.0")(Stream(hidden, None)), model)
    assert measured == pytest.approx(block_bytes(resolved, Layout.of(resolved)), rel=0.05)


TP = {"model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
CP = {"context_parallel_size": 2}
HEADS = {**CP, "context_parallel_method": "all_to_all"}
AGAIN = {"checkpoint_activations": True}
SCORES, NARROW = {**AGAIN, "checkpoint_operations": ["attention"]}, {**AGAIN, "checkpoint_operations": ["activation"]}
NORMS = {**AGAIN, "checkpoint_operations": ["norm"]}
CHEAP = {**AGAIN, "checkpoint_operations": ["norm", "activation"]}
LLAMA = {**BLOCKS["LLaMA"], "mlp_multiple_of": 8}

SHARED: dict[str, tuple[int, dict]] = {
    # processes, keys
    "tensor": (2, TP),
    "tensor, parallel residual": (2, {**TP, "gpt_j_residual": True}),
    "tensor, norms of queries and keys": (2, {**TP, "use_qk_layernorm": True}),
    "tensor, rms norms of queries and keys": (2, {**TP, **LLAMA, "use_qk_layernorm": True}),
    "sequence": (2, SP),
    "sequence, LLaMA": (2, {**SP, **LLAMA}),
    "sequence, parallel residual": (2, {**SP, "gpt_j_residual": True}),
    "ring": (2, CP),
    "ring, LLaMA": (2, {**CP, **LLAMA}),
    "ring, norms of queries and keys": (2, {**CP, "use_qk_layernorm": True}),
    "ring, sequence": (4, {**CP, **SP}),
    "ring, attention recomputed": (2, {**CP, **SCORES}),
    "ring, fp8": (2, {**CP, "precision": "fp8"}),
    "tensor, fp8, attention recomputed": (2, {**TP, **SCORES, "precision": "fp8"}),
    "all to all": (2, HEADS),
    "all to all, LLaMA": (2, {**HEADS, **LLAMA}),
    "all to all, norms of queries and keys": (2, {**HEADS, "use_qk_layernorm": True}),
    "all to all, attention recomputed": (2, {**HEADS, **SCORES}),
    "attention recomputed": (1, SCORES),
    "activation recomputed": (1, NARROW),
    "activation recomputed, LLaMA": (1, {**NARROW, **LLAMA}),
    "norms recomputed": (1, NORMS),
    "norms recomputed, LLaMA": (1, {**NORMS, **LLAMA}),
    "norms recomputed, GPT-J": (1, {**NORMS, **BLOCKS["GPT-J"]}),
    "norms recomputed, sequence": (2, {**NORMS, **SP}),
    "norms recomputed, sequence, parallel residual": (2, {**NORMS, **SP, "gpt_j_residual": True}),
    "norms and activation recomputed": (1, CHEAP),
    "norms and activation recomputed in fp8": (1, {**BLOCKS["GPT-NeoX fp8"], **CHEAP}),
    "all recomputed, tensor": (2, {**TP, **AGAIN, "checkpoint_operations": ["norm", "attention", "activation"]}),
    "all recomputed, ring": (2, {**CP, **AGAIN, "checkpoint_operations": ["norm", "attention", "activation"]}),
}  # fmt: skip


def _kept_on_a_rank(processes, keys):
    """Run inside a rank: bytes that one block keeps; what recomputed operations start from is kept by nobody else."""
    resolved = _config(processes, **keys)
    model = build_model(resolved, VOCAB, make_mesh(resolved))
    layout = Layout.of(resolved)
    length = 64 // layout.cp // (layout.tp if layout.sequence_parallel else 1)
    hidden = torch.randn(2, length, 64, dtype=torch.bfloat16, requires_grad=True)
    starts, run = [], recompute.checkpoint

    def checkpoint(function, *inputs, **settings):
        starts.extend(value for value in inputs if isinstance(value, torch.Tensor))
        return run(function, *inputs, **settings)

    recompute.checkpoint = checkpoint
    try:
        measured, _ = _kept(lambda: model.get_submodule("layers.0")(Stream(hidden, None)), model, starts)
    finally:
        recompute.checkpoint = run
    return measured


@pytest.mark.parametrize("name", SHARED)
def test_each_of_several_processes_keeps_what_is_planned(name):
    processes, keys = SHARED[name]
    resolved = _config(processes, **keys)
    planned = block_bytes(resolved, Layout.of(resolved))
    assert run_ranks(processes, _kept_on_a_rank, processes, keys) == [pytest.approx(planned, rel=0.05)] * processes


def test_recomputation_keeps_only_the_inputs_of_its_chunks():
    plain_config, plain = _model()
    data = batch(plain_config)
    loss = {"labels": data.labels, "loss_mask": data.loss_mask}
    everything, _ = _kept(lambda: plain(data.tokens, **loss), plain)
    inputs = {}
    for together in (1, 2):
        resolved, model = _model(checkpoint_activations=True, checkpoint_num_layers=together)
        size = boundary_bytes(resolved, Layout.of(resolved))
        gc.collect()
        gc.freeze()
        measured, result = _kept(lambda model=model: model(data.tokens, **loss), model)
        inputs[together] = sum(held == size for held in live(model).values())
        gc.unfreeze()
        kept = 2 // together * size
        assert everything - measured == pytest.approx(
            2 * block_bytes(plain_config, Layout.of(plain_config)) - kept, rel=0.05
        )
        result.backward()
    assert inputs[1] == inputs[2] + 1


@pytest.mark.parametrize(("fusion", "logit"), [("auto", 2), (False, 6)])
def test_the_loss_holds_its_gradients_and_one_chunk(fusion, logit, monkeypatch):
    assert CHUNK_BYTES == cross_entropy.CUDA_CHUNK_BYTES
    resolved, _ = _model(cross_entropy_fusion=fusion)
    layout, count, hidden = Layout.of(resolved), 2 * 64, 64
    chunk = 3 * count * hidden * 2 + VOCAB * hidden * 2 + count * VOCAB * logit
    assert loss_bytes(resolved, layout, VOCAB) == chunk
    monkeypatch.setattr("megatron.planning.activations.CHUNK_BYTES", 2 * VOCAB * 32)  # 32 tokens to a chunk
    copy = VOCAB * hidden * 2  # of the weight's gradient, rounded
    several = 3 * count * hidden * 2 + VOCAB * hidden * 4 + max(copy, 32 * VOCAB * logit)
    assert loss_bytes(resolved, layout, VOCAB) == several
