"""Equality with transformers' GPTNeoX, LLaMA and GPT-2: logits, loss and gradients from the same weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from megatron.data.batch import Batch
from megatron.model.sequential import SequentialModel
from megatron.objectives.language import language_loss
from tests.model.models import VOCAB, random_tokens, small_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def neox(**settings: object) -> nn.Module:
    config = transformers.GPTNeoXConfig(**SHAPE, intermediate_size=128, max_position_embeddings=32, **settings)
    return transformers.GPTNeoXForCausalLM(config)


NEOX_NAMES = {
    "embedding.word_embeddings": "gpt_neox.embed_in",
    "layers.": "gpt_neox.layers.",
    "mlp.linear1": "mlp.dense_h_to_4h",
    "mlp.linear2": "mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
}


def renamed(model: SequentialModel, names: dict[str, str]) -> dict[str, Tensor]:
    """Return our weights under other names."""
    result = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        result[name] = parameter.detach()
    return result


def llama_weights(model: SequentialModel, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Return our weights as LLaMA has them: projections of their own, the gate before the value."""
    names = {
        "embedding.word_embeddings": "model.embed_tokens",
        "layers.": "model.layers.",
        "attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.linear2": "mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    }
    result = {}
    for name, weight in renamed(model, names).items():
        prefix = name.rsplit(".", 2)[0].removesuffix(".attention").removesuffix(".mlp")
        if "query_key_value" in name:
            groups = weight.view(kv_heads, heads // kv_heads + 2, 8, 32)
            result[f"{prefix}.self_attn.q_proj.weight"] = groups[:, :-2].reshape(-1, 32)
            result[f"{prefix}.self_attn.k_proj.weight"] = groups[:, -2].reshape(-1, 32)
            result[f"{prefix}.self_attn.v_proj.weight"] = groups[:, -1].reshape(-1, 32)
        elif "linear1" in name:
            result[f"{prefix}.mlp.up_proj.weight"], result[f"{prefix}.mlp.gate_proj.weight"] = weight.chunk(2)
        else:
            result[name] = weight
    return result


def gpt2_weights(model: SequentialModel, heads: int) -> dict[str, Tensor]:
    """Return our weights as GPT-2 has them: transposed, with all queries before all keys before all values."""
    names = {
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "layers.": "transformer.h.",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "mlp.linear1": "mlp.c_fc",
        "mlp.linear2": "mlp.c_proj",
        "final_norm": "transformer.ln_f",
    }
    result = {}
    for name, weight in renamed(model, names).items():
        if "c_attn" in name:
            weight = weight.view(heads, 3, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
        result[name] = weight.t() if ".c_" in name and weight.dim() == 2 else weight
    return {**result, "lm_head.weight": result["transformer.wte.weight"]}


def check(ours: SequentialModel, theirs: nn.Module, embedding: str) -> None:
    """Compare logits, loss, and the gradients that reach the embedding through every layer."""
    tokens = random_tokens(3, 21)
    labels = torch.roll(tokens, -1, dims=1)
    expected = theirs.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours(tokens), expected, **TOLERANCE)
    mask = torch.ones(labels.shape)
    mask[:, -4:] = 0
    total, num_tokens = language_loss(ours, Batch(tokens, labels, mask))
    (total / num_tokens).backward()
    losses = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="none")
    expected_loss = (losses * mask.flatten()).sum() / mask.sum()
    torch.testing.assert_close(total / num_tokens, expected_loss, **TOLERANCE)
    expected_loss.backward()
    gradient = theirs.get_parameter(embedding).grad
    torch.testing.assert_close(ours.get_parameter("embedding.word_embeddings.weight").grad, gradient, **TOLERANCE)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("percent", [0.25, 1.0])
def test_gpt_neox(parallel: bool, percent: float) -> None:
    ours = small_model(gpt_j_residual=parallel, rotary_pct=percent)
    theirs = neox(use_parallel_residual=parallel, rotary_pct=percent)
    theirs.load_state_dict(renamed(ours, NEOX_NAMES))
    check(ours, theirs, "gpt_neox.embed_in.weight")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama(kv_heads: int) -> None:
    ours = small_model(
        norm="rmsnorm",
        rms_norm_epsilon=1e-5,
        activation="swiglu",
        intermediate_size=60,
        mlp_multiple_of=20,
        use_bias_in_mlp=False,
        use_bias_in_attn_linear=False,
        rotary_pct=1.0,
        rotary_emb_base=5000,
        num_kv_heads=kv_heads,
    )
    width = ours.get_parameter("layers.0.mlp.linear2.weight").shape[1]
    config = transformers.LlamaConfig(
        **SHAPE,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        max_position_embeddings=32,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(llama_weights(ours, 4, kv_heads))
    check(ours, theirs, "model.embed_tokens.weight")


def test_gpt2() -> None:
    ours = small_model(pos_emb="learned", no_weight_tying=False, bias_gelu_fusion=True)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(gpt2_weights(ours, 4))
    check(ours, theirs, "transformer.wte.weight")


def test_mistral_window() -> None:
    """Mistral's window counts the token itself, GPT-NeoX's does not."""
    ours = small_model(
        norm="rmsnorm",
        rms_norm_epsilon=1e-6,
        activation="swiglu",
        mlp_multiple_of=8,
        use_bias_in_mlp=False,
        use_bias_in_attn_linear=False,
        rotary_pct=1.0,
        num_kv_heads=2,
        sliding_window_width=4,
    )
    width = ours.get_parameter("layers.0.mlp.linear2.weight").shape[1]
    config = transformers.MistralConfig(
        **SHAPE,
        num_key_value_heads=2,
        intermediate_size=width,
        sliding_window=5,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    theirs = transformers.MistralForCausalLM(config)
    theirs.load_state_dict(llama_weights(ours, 4, 2))
    check(ours, theirs, "model.embed_tokens.weight")
