"""Initial weights: the distribution of each method, and the same weights in every layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.config.schema.numerics import InitMethod
from megatron.model.build import build_model
from megatron.model.init import initialize, make_initializer
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import get_spec, merge
from tests.model.models import small_config

LAYERS, HIDDEN = 6, 40
DEVIATIONS = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(12),
    "single_residual_scaled_normal": 0.02 / math.sqrt(6),
    "small_init": math.sqrt(2 / 200),
    "wang_init": 2 / (6 * math.sqrt(40)),
    "xavier_normal": math.sqrt(2 / 700),
    "xavier_uniform": math.sqrt(2 / 700),
    "orthogonal": math.sqrt(2) / math.sqrt(400),
    "scaled_orthogonal": math.sqrt(2 / 6) / math.sqrt(400),
}


@pytest.mark.parametrize("method", InitMethod.__args__)
def test_deviation_of_each_method(method: str) -> None:
    draw = make_initializer(method, 0.02, LAYERS, HIDDEN)
    weight = draw((400, 300), torch.Generator().manual_seed(0))
    assert weight.dtype == torch.float32
    assert float(weight.std()) == pytest.approx(DEVIATIONS[method], rel=0.02)
    assert abs(float(weight.mean())) < DEVIATIONS[method] / 100


@pytest.mark.parametrize(("method", "gain"), [("orthogonal", 2), ("scaled_orthogonal", 2 / LAYERS)])
def test_orthogonal_matrices_are_orthogonal(method: str, gain: float) -> None:
    weight = make_initializer(method, 0.02, LAYERS, HIDDEN)((20, 30), torch.Generator())
    torch.testing.assert_close(weight @ weight.T, gain * torch.eye(20), rtol=1e-4, atol=1e-5)


def test_shares_of_two_ranks_make_the_whole() -> None:
    draw = make_initializer("normal", 0.02, LAYERS, HIDDEN)
    for kind in (ColumnParallelLinear, RowParallelLinear):
        shares = []
        for axis in (Axis("tp"), Axis("tp", 2, 0), Axis("tp", 2, 1)):
            layer = kind(8, 12, TensorRegion(axis), draw, True)
            initialize(layer, "layers.0.part", 1234, axis)
            shares.append(layer)
        for name, parameter in shares[0].named_parameters():
            pieces = [share.get_parameter(name) for share in shares[1:]]
            assert torch.equal(merge(pieces, get_spec(parameter)), parameter)


def test_weights_depend_on_seed_and_name_only() -> None:
    def weights(**settings: object) -> dict[str, torch.Tensor]:
        return dict(build_model(small_config(**settings), 128, Mesh.single()).named_parameters())

    first, deeper, reseeded, half = weights(), weights(num_layers=3), weights(seed=5), weights(precision="bf16")
    name = "layers.1.mlp.linear1.weight"
    assert torch.equal(first[name], deeper[name])
    assert not torch.equal(first[name], reseeded[name])
    assert torch.equal(first[name].bfloat16(), half[name])
    assert not torch.equal(first[name], first["layers.0.mlp.linear1.weight"])


def test_which_method_fills_which_weight() -> None:
    config = small_config(
        num_layers=4, hidden_size=64, init_method="small_init", output_layer_init_method="wang_init", pos_emb="learned"
    )
    small, wang = math.sqrt(2 / (5 * 64)), 2 / (4 * math.sqrt(64))
    for name, parameter in build_model(config, 128, Mesh.single()).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
        else:
            expected = wang if name.endswith(("dense.weight", "linear2.weight")) else small
            assert float(parameter.std()) == pytest.approx(expected, rel=0.06), name
