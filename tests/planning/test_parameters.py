"""The list of tensors against the modules, which are written without it."""

import math
from dataclasses import replace

import pytest

from megatron.errors import ConfigError
from megatron.model.accounting import num_parameters
from megatron.model.build import build_model, build_plans
from megatron.model.stage import StagePlan
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.grad_sync import is_partial
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.sharding import get_spec, local_shape
from megatron.planning.parameters import items
from megatron.planning.stages import stages
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
    for sequence in (False, True):
        region = TensorRegion(Axis("tp", 2), sequence)
        kinds = {"tensor", "sequence"} if sequence else {"tensor"}
        found = {name for name, tensor in planned.items() if tensor.partial in kinds}
        assert found == {name for name, parameter in parameters.items() if is_partial(parameter, region)}


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


@pytest.mark.parametrize("method", ["parameters", "uniform", "type:transformer|embedding", "type:norm"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_stages_hold_what_training_puts_there(keys, dropout, method):
    resolved = config(num_layers=5, pipe_partition_method=method, hidden_dropout=dropout, **keys)
    mesh = Mesh.single()
    for tp in (1, 2):
        axis = replace(mesh.tp, size=tp)
        plans = build_plans(resolved, VOCAB, replace(mesh, tp=axis))
        for pp in (2, 3, 5):
            split = StagePlan.of(plans, pp, method, axis)
            planned = stages(resolved, VOCAB, pp, tp)
            for stage, one in enumerate(planned):
                assert {each.name for each in one.parameters} == split.held(stage)
                assert [int(split.titles[layer].split(".")[1]) for layer in split.layers(stage)
                        if split.titles[layer].startswith("layers.")] == list(one.blocks)  # fmt: skip
            assert {each.name for one in planned for each, _ in one.shared} == set(split.shared())
    whole = stages(resolved, VOCAB, 1)[0]
    assert sum(one.num_parameters for one in stages(resolved, VOCAB, 2)) == whole.num_parameters + sum(
        math.prod(split.shapes[name]) for name in StagePlan.of(build_plans(resolved, VOCAB, mesh), 2, method).shared()
    )


def test_a_method_that_finds_nothing_and_too_many_stages_are_said():
    with pytest.raises(ConfigError, match=r"no layer is called that; there are: embedding\.word_embeddings Vocab"):
        stages(config(pipe_partition_method="type:nothing"), VOCAB, 2)
    with pytest.raises(ConfigError, match="each stage needs a layer, and num_layers = 8"):
        stages(config(), VOCAB, 9)


def test_stages_of_a_tied_table_hold_it_twice():
    resolved = config(no_weight_tying=False, pos_emb="learned")
    whole = num_parameters(resolved.model, VOCAB)
    assert sum(stage.num_parameters for stage in stages(resolved, VOCAB, 2)) == whole + VOCAB * 32
