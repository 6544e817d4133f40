"""Decay applies to GPT-NeoX's parameters: all but norms and biases, embeddings included."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from megatron.config.resolve import resolve
from megatron.model.build import build_model
from megatron.optim.groups import decays, parameter_groups
from megatron.parallel.mesh import Mesh

_SHAPE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_iters": 1,
}


@pytest.mark.parametrize("run", ["pythia_dp1", "gpt2_tied_linear_noclip"])
def test_the_groups_have_the_sizes_that_gpt_neox_reports(golden, run):
    recorded = json.loads((golden / "train" / f"{run}.json").read_text())
    keys = ("pos_emb", "rotary_pct", "no_weight_tying", "gpt_j_residual", "optimizer", "weight_decay", "norm")
    config = resolve({**_SHAPE, **{key: recorded["config"][key] for key in keys}})
    groups = parameter_groups(build_model(config, 512, Mesh.single()).named_parameters(), config.optimizer.weight_decay)
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    assert [(group["weight_decay"], size) for group, size in zip(groups, sizes, strict=True)] == [
        (decay, size) for _, decay, size in recorded["groups"]
    ]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"])
def test_norms_and_biases_do_not_decay(norm):
    config = resolve({**_SHAPE, "norm": norm, "use_qk_layernorm": True})
    model = build_model(config, 128, Mesh.single())
    for name, parameter in model.named_parameters():
        assert decays(parameter) == (not ("norm" in name or name.endswith("bias"))), name


def test_tagged_and_frozen_parameters():
    tagged, frozen, plain = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    tagged.no_weight_decay = True
    frozen.requires_grad = False
    groups = parameter_groups([("a", tagged), ("b", frozen), ("c", plain)], 0.1)
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(plain)], [id(tagged)]]


def test_no_group_is_empty_and_no_decay_is_one_group():
    matrix, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert len(parameter_groups([("m", matrix)], 0.1)) == 1
    (only,) = parameter_groups([("m", matrix), ("b", bias)], 0.0)
    assert only["weight_decay"] == 0.0
    assert len(only["params"]) == 2
