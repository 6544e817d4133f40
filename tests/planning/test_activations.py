"""Predicted bytes against what autograd really keeps, by storage, for every kind of block."""

import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron.model.build import build_model
from megatron.model.stream import Stream
from megatron.ops import cross_entropy
from megatron.parallel.mesh import Mesh
from megatron.planning.activations import CHUNK_BYTES, block_bytes, boundary_bytes, loss_bytes
from megatron.planning.layout import Layout
from tests.planning.small import VOCAB, batch, config, live, storages

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
    "window": {"pos_emb": "none", "sliding_window_width": 8},
}


@pytest.fixture(autouse=True)
def _attention_of_a_gpu(monkeypatch):
    """A plan is for GPUs, whose attention is PyTorch's; on a CPU another path may serve training."""
    monkeypatch.setattr("megatron.ops.attention._trains_on_cpu", lambda query: False)


def _kept(function, model):
    """Return the bytes that `function` keeps for its backward pass, parameters apart."""
    found, tensors = {}, []

    def keep(tensor):
        tensors.append(tensor)  # alive, so that no other storage takes its address
        found.update(storages([tensor]))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    parameters = storages(model.parameters())
    return sum(size for address, size in found.items() if address not in parameters), result


def _model(**keys):
    resolved = config(num_layers=2, hidden_size=64, seq_length=64, max_position_embeddings=64, **keys)
    return resolved, build_model(resolved, VOCAB, Mesh.single())


@pytest.mark.parametrize("keys", BLOCKS.values(), ids=BLOCKS)
def test_a_block_keeps_what_is_planned(keys):
    resolved, model = _model(**keys)
    dtype = next(model.parameters()).dtype
    hidden = torch.randn(2, 64, 64, dtype=dtype, requires_grad=True)
    measured, _ = _kept(lambda: model.get_submodule("layers.0")(Stream(hidden, None)), model)
    assert measured == pytest.approx(block_bytes(resolved, Layout.of(resolved)), rel=0.05)


def test_heads_and_widths_are_split_over_the_tensor_axis_and_norms_under_sequence_parallelism():
    resolved = config(num_layers=1)
    one, two = (block_bytes(resolved, Layout(tp=tp, micro_batch=2)) for tp in (1, 2))
    spread = block_bytes(resolved, Layout(tp=2, micro_batch=2, sequence_parallel=True))
    assert spread == one // 2
    norms = 2 * 32 * (4 * 32 * 2 + 16)  # two inputs, two outputs and their statistics
    assert two == (one - norms) // 2 + norms


def test_recomputation_keeps_only_the_inputs_of_its_chunks():
    plain_config, plain = _model()
    data = batch(plain_config)
    loss = {"labels": data.labels, "loss_mask": data.loss_mask}
    everything, _ = _kept(lambda: plain(data.tokens, **loss), plain)
    inputs = {}
    for recompute in (1, 2):
        resolved, model = _model(checkpoint_activations=True, checkpoint_num_layers=recompute)
        size = boundary_bytes(resolved, Layout.of(resolved))
        gc.collect()
        gc.freeze()  # the inputs are held by the checkpoint, not by autograd
        measured, result = _kept(lambda model=model: model(data.tokens, **loss), model)
        inputs[recompute] = sum(held == size for held in live(model).values())
        gc.unfreeze()
        assert everything - measured == pytest.approx(2 * block_bytes(plain_config, Layout.of(plain_config)), rel=0.05)
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
