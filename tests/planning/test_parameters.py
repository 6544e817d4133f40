"""The list of tensors against the modules, which are written without it."""

import pytest

from megatron.model.accounting import num_parameters
from megatron.model.build import build_model
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import get_spec, local_shape
from megatron.planning.memory import stages
from megatron.planning.parameters import items
from megatron.planning.stages import balanced
from tests.planning.small import VOCAB, config

MODELS = {
    "GPT-NeoX": {"gpt_j_residual": True},
    "GPT-2": {"pos_emb": "learned", "no_weight_tying": False},
    "GPT-J": {"gpt_j_residual": True, "gpt_j_tied": True, "use_bias_in_attn_linear": False},
    "LLaMA": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "mlp_multiple_of": 8},
    "rpe": {"pos_emb": "rpe", "norm": "scalenorm"},
    "qk": {"use_qk_layernorm": True, "use_bias_in_norms": False, "intermediate_size": 80},
    "plain": {"norm": "non_parametric_layernorm", "pos_emb": "alibi"},
}  # fmt: skip


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_names_shapes_and_splits_are_the_modules(keys):
    resolved = config(**keys)
    parameters = dict(build_model(resolved, VOCAB, Mesh.single()).named_parameters())
    planned = {tensor.name: tensor for item in items(resolved.model, VOCAB) for tensor in item.parameters}
    assert {name: tensor.shape for name, tensor in planned.items()} == {
        n: tuple(p.shape) for n, p in parameters.items()
    }
    for tp in (1, 2):
        local = {name: local_shape(tuple(p.shape), get_spec(p), tp) for name, p in parameters.items()}
        assert {name: tensor.numel(tp) for name, tensor in planned.items()} == {
            n: _product(s) for n, s in local.items()
        }


def _product(shape):
    result = 1
    for size in shape:
        result *= size
    return result


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_the_sum_is_the_closed_formula(keys):
    model = config(**keys).model
    (stage,) = stages(config(**keys), VOCAB, 1)
    assert stage.num_parameters == num_parameters(model, VOCAB)


def test_stages_are_contiguous_and_as_even_as_they_can_be():
    assert balanced([3, 1, 1, 1, 1, 1, 3], 3) == [0, 2, 5, 7]
    assert balanced([5, 1, 1], 3) == [0, 1, 2, 3]
    bounds = balanced([310, *[453] * 44, 1, 310], 4)  # GPT-NeoX-20B, in millions
    assert bounds == [0, 12, 23, 34, 47]
    with pytest.raises(ValueError, match="3 layers cannot make 4 stages"):
        balanced([1, 1, 1], 4)


def test_stages_of_a_tied_table_hold_it_twice():
    resolved = config(no_weight_tying=False, pos_emb="learned")
    whole = num_parameters(resolved.model, VOCAB)
    assert sum(stage.num_parameters for stage in stages(resolved, VOCAB, 2)) == whole + VOCAB * 32
