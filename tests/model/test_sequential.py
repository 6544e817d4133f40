"""Names, sharing, the forms of the output, activation checkpointing, and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.model.build import build_model, build_plans
from megatron.model.norm import INSIDE, OUTSIDE
from megatron.model.sequential import SequentialModel
from megatron.objectives.language import language_loss
from megatron.parallel.mesh import Mesh
from megatron.parallel.rng import RngStreams
from megatron.parallel.sharding import ShardSpec, get_spec
from tests.model.models import VOCAB, random_tokens, small_config, small_model

NAMES = [
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "layers.0.input_layernorm.weight",
    "layers.0.input_layernorm.bias",
    "layers.0.attention.query_key_value.weight",
    "layers.0.attention.query_key_value.bias",
    "layers.0.attention.dense.weight",
    "layers.0.attention.dense.bias",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.post_attention_layernorm.bias",
    "layers.0.mlp.linear1.weight",
    "layers.0.mlp.linear1.bias",
    "layers.0.mlp.linear2.weight",
    "layers.0.mlp.linear2.bias",
    "final_norm.weight",
    "final_norm.bias",
    "head.weight",
]


def gradients(model: SequentialModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total, num_tokens = language_loss(model, Batch(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape)))
    (total / num_tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_canonical_names() -> None:
    model = small_model(num_layers=1, pos_emb="learned")
    assert [name for name, _ in model.named_parameters()] == NAMES


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"no_weight_tying": False}, "head.weight"),
        ({"use_bias_in_norms": False}, "final_norm.bias"),
        ({"use_bias_in_mlp": False}, "layers.0.mlp.linear2.bias"),
        ({"use_bias_in_attn_linear": False}, "layers.0.attention.dense.bias"),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, "layers.0.post_attention_layernorm.weight"),
        ({"norm": "non_parametric_layernorm"}, "final_norm.weight"),
    ],
)
def test_what_is_switched_off_has_no_parameter(settings: dict[str, Any], absent: str) -> None:
    names = [name for name, _ in small_model(**settings).named_parameters()]
    assert absent not in names
    assert absent in [name for name, _ in small_model().named_parameters()]


def test_plans_are_named_in_the_order_of_the_model() -> None:
    config = small_config(pos_emb="learned", hidden_dropout=0.1, no_weight_tying=False)
    plans = build_plans(config, VOCAB, Mesh.single())
    assert [plan.name for plan in plans] == [
        "embedding.word_embeddings",
        "embedding.position_embeddings",
        "embedding.dropout",
        "layers.0",
        "layers.1",
        "final_norm",
        "head",
    ]
    assert plans[0].share == plans[-1].share is not None


@pytest.mark.parametrize(("parallel_residual", "norm"), [(False, OUTSIDE), (True, INSIDE)])
def test_specs_of_a_block(parallel_residual: bool, norm: ShardSpec) -> None:
    model = small_model(activation="swiglu", gpt_j_residual=parallel_residual)
    specs = {name.split(".", 2)[2]: get_spec(p) for name, p in model.named_parameters() if name.startswith("layers.0")}
    assert specs["attention.query_key_value.weight"] == ShardSpec(0)
    assert specs["attention.dense.weight"] == ShardSpec(1)
    assert specs["mlp.linear1.weight"] == ShardSpec(0, blocks=2)
    assert specs["mlp.linear2.bias"] == ShardSpec()
    assert specs["input_layernorm.weight"] == norm


@pytest.mark.parametrize("tied", [True, False])
def test_the_three_outputs_agree(tied: bool) -> None:
    model, tokens = small_model(no_weight_tying=not tied), random_tokens()
    labels, mask = random_tokens(seed=2), (random_tokens(seed=3) % 2).float()
    logits = model(tokens)
    assert logits.shape == (2, 24, VOCAB)
    losses = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected.view(2, 24), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens, labels=labels, loss_mask=mask), (losses * mask).sum(), rtol=1e-5, atol=0)


def test_a_tied_matrix_gets_the_gradient_of_both_uses() -> None:
    tied, untied = small_model(no_weight_tying=False), small_model()
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.get_parameter("embedding.word_embeddings.weight")})
    tokens = random_tokens()
    one, two = gradients(tied, tokens), gradients(untied, tokens)
    both = two.pop("head.weight") + two["embedding.word_embeddings.weight"]
    torch.testing.assert_close(one["embedding.word_embeddings.weight"], both)


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_recomputed_activations_give_the_same_gradients(layers: int) -> None:
    settings = {"num_layers": 5, "hidden_dropout": 0.2, "attention_dropout": 0.2, "pos_emb": "rpe"}
    streams, tokens = RngStreams(1, Mesh.single()), random_tokens()
    results = []
    for recompute in (False, True):
        model = small_model(**settings, checkpoint_activations=recompute, checkpoint_num_layers=layers)
        streams.start_micro_batch(3, 0)
        results.append((gradients(model, tokens), torch.rand(2)))
    (kept, after_kept), (recomputed, after_recomputed) = results
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    assert torch.equal(after_kept, after_recomputed)  # recomputation leaves the random stream where it was


def test_recomputation_keeps_fewer_activations() -> None:
    def saved(recompute: bool) -> int:
        model = small_model(num_layers=4, checkpoint_activations=recompute)
        numbers = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(random_tokens(), labels=random_tokens(), loss_mask=torch.ones(2, 24))
        return numbers

    assert saved(True) < saved(False) / 3


def test_dropout_acts_in_training_and_nowhere_else() -> None:
    for settings in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        for parallel in (True, False):
            model, tokens = small_model(**settings, gpt_j_residual=parallel), random_tokens()
            assert not torch.equal(model(tokens), model(tokens))
            model.eval()
            assert torch.equal(model(tokens), model(tokens))
            plain = small_model(gpt_j_residual=parallel)
            torch.testing.assert_close(model(tokens), plain(tokens))


def test_dropout_reaches_branches_without_bias() -> None:
    model = small_model(hidden_dropout=0.5, use_bias_in_mlp=False, pos_emb="none", num_layers=1)
    block = model.get_submodule("layers.0")
    with torch.no_grad():
        block.get_parameter("attention.dense.weight").zero_()
        block.get_parameter("attention.dense.bias").zero_()
    model.get_submodule("embedding.dropout").eval()
    assert not torch.equal(model(random_tokens()), model(random_tokens()))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_parameters_have_the_precision_of_the_config(precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    model = build_model(small_config(precision=precision), VOCAB, Mesh.single())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    tokens = random_tokens()
    assert model(tokens).dtype == dtype
    assert model(tokens, labels=tokens).dtype == torch.float32


def test_bf16_is_close_to_fp32() -> None:
    exact = small_model()
    half = small_model(precision="bf16")
    half.load_state_dict(exact.state_dict())
    tokens = random_tokens()
    torch.testing.assert_close(half(tokens).float(), exact(tokens), rtol=0.05, atol=0.15)


def test_embedding_multiplier_scales_positions_only() -> None:
    one, two = small_model(pos_emb="learned"), small_model(pos_emb="learned", mup_rp_embedding_mult=2.0)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        one.get_parameter("embedding.position_embeddings.weight").mul_(2)
    torch.testing.assert_close(one(random_tokens()), two(random_tokens()))


def test_empty_weights_are_not_drawn() -> None:
    model = build_model(small_config(), VOCAB, Mesh.single(), initialized=False)
    assert all(not bool(parameter.any()) for parameter in model.parameters())
