"""Equality with recorded outputs of GPT-NeoX: logits, loss and the gradient of every parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.data.batch import Batch
from megatron.model.build import build_model
from megatron.model.sequential import SequentialModel
from megatron.objectives.language import language_loss
from megatron.parallel.mesh import Mesh
from tests.model.models import SMALL, VOCAB, small_config

FP32 = {"rtol": 1e-4, "atol": 2e-6}
# bf16 keeps 8 bits: the logits are sums of 32 products, and GPT-NeoX turns its rotary tables into bf16 first.
BF16 = {"rtol": 3e-2, "atol": 3e-2}

# GPT-NeoX ignores these keys here, so they are left at what it computed.
WITHOUT_EFFECT = ("use_bias_in_norms", "num_unique_layers", "onnx_safe", "bias_dropout_fusion")
# GPT-NeoX's parallel residual without MLP biases drops the attention; ours does not.
DEFECTIVE = ("no_bias_mlp_swiglu_gptj",)
OTHER_ARCHITECTURES = ("mamba",)
CASES = [
    "base_rotary25",
    "pythia",
    "gptj_tied",
    "learned_tied",
    "learned_untied",
    "rotary100",
    "rotary_short_input",
    "alibi",
    "sinusoidal",
    "rpe",
    "pos_none",
    "rmsnorm",
    "rmsnorm_default_eps",
    "nonparametric",
    "layernorm_eps1e-3",
    "act_geglu",
    "act_swiglu",
    "act_glu",
    "act_relu",
    "act_softsign",
    "act_swish",
    "act_silu",
    "act_gelu_onnx_safe",
    "act_gelu_bias_fusion",
    "act_swiglu_intermediate96",
    "mlp_intermediate80",
    "mlp_expansion3",
    "gqa2",
    "gqa2_rotary100",
    "gqa2_learned",
    "no_bias_attn",
    "no_bias_attn_gptj",
    "no_bias_mlp_swiglu",
    "no_bias_norms",
    "llama",
    "qk_layernorm",
    "qk_rmsnorm",
    "qk_layer_scaling",
    "softmax_fp32",
    "bias_dropout_fusion",
    "activation_checkpointing",
    "eod_mask_loss",
    "bf16",
    "num_unique_layers1",
    "pipe_module_forward",
]


def canonical_name(name: str, num_layers: int) -> str | None:
    """Return our name of `sequential.<index>.<rest>`, or None for a second copy of a shared tensor."""
    index, rest = name.removeprefix("sequential.").split(".", 1)
    for theirs, ours in ((".scale", ".weight"), ("qk_layernorm", "qk_norm"), (".g", ".weight")):
        rest = (
            rest.removesuffix(theirs) + ours
            if theirs[0] == "." and rest.endswith(theirs)
            else rest.replace(theirs, ours)
        )
    position = int(index)
    if position == 0:
        return f"embedding.{rest}"
    if position == num_layers + 3:
        return rest.replace("norm.", "final_norm.")
    if position == num_layers + 4:
        return rest.replace("final_linear", "head")
    return None if "rpe" in rest and position > 2 else f"layers.{position - 2}.{rest}"


def group_rows(tensor: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return rows [all q; all k; all v] in the order of groups."""
    head_dim = tensor.shape[0] // (heads + 2 * kv_heads)
    query, key, value = tensor.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    parts = [part.view(kv_heads, -1, *tensor.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def neox_tensors(tensors: dict[str, Tensor], kind: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return GPT-NeoX's tensors of a kind ("param." or "grad.") under our names and in our layout."""
    heads, kv_heads = settings["num_attention_heads"], settings.get("num_kv_heads", settings["num_attention_heads"])
    result = {}
    for name, tensor in tensors.items():
        ours = canonical_name(name.removeprefix(kind), settings["num_layers"]) if name.startswith(kind) else None
        if ours is None:
            continue
        grouped = "query_key_value" in ours and heads != kv_heads
        result[ours] = group_rows(tensor, heads, kv_heads) if grouped else tensor
    return result


def load_case(golden: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor], SequentialModel]:
    """Return a case's settings, its tensors, and our model with its weights."""
    cases = json.loads((golden / "model" / "cases.json").read_text())
    settings = {key: value for key, value in cases["cases"][case]["settings"].items() if key not in WITHOUT_EFFECT}
    if "precision" in settings:
        settings["precision"] = "bf16"
    tensors = load_file(golden / "model" / f"{case}.safetensors")
    config = small_config(**settings)
    model = build_model(config, VOCAB, Mesh.single())
    weights = neox_tensors(tensors, "param.", {**SMALL, **settings})
    parameters = dict(model.named_parameters())
    unused = {name for name in weights if settings.get("gpt_j_tied") and "post_attention" in name}
    assert set(parameters) == set(weights) - unused
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return {**SMALL, **settings}, tensors, model


def test_every_recorded_case_is_covered(golden: Path) -> None:
    recorded = {path.stem for path in (golden / "model").glob("*.safetensors")}
    assert recorded == {*CASES, *DEFECTIVE, *OTHER_ARCHITECTURES}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_neox(golden: Path, case: str) -> None:
    settings, tensors, model = load_case(golden, case)
    tolerance = BF16 if case == "bf16" else FP32
    batch = Batch(tensors["tokens"], tensors["labels"], tensors["loss_mask"])
    torch.testing.assert_close(model(batch.tokens).float(), tensors["logits"].float(), **tolerance)

    total, num_tokens = language_loss(model, batch)
    loss = total / num_tokens
    torch.testing.assert_close(loss.view(1), tensors["loss"].float().view(1), **tolerance)
    loss.backward()
    for name, gradient in neox_tensors(tensors, "grad.", settings).items():
        ours = model.get_parameter(name).grad
        assert ours is not None, name
        if case == "bf16":
            # Rounding differs along the way; the direction and the length of the gradient must not.
            error = (ours.float() - gradient.float()).norm() / gradient.float().norm()
            assert error < 0.02, (name, error)
        else:
            torch.testing.assert_close(ours, gradient, **FP32, msg=lambda text, name=name: f"{name}: {text}")


def test_parallel_residual_without_mlp_bias_keeps_its_attention(golden: Path) -> None:
    _, tensors, model = load_case(golden, DEFECTIVE[0])
    logits = model(tensors["tokens"])
    assert not torch.allclose(logits, tensors["logits"], atol=1e-2)
    with torch.no_grad():
        for layer in range(SMALL["num_layers"]):
            for parameter in model.get_submodule(f"layers.{layer}.attention.dense").parameters():
                parameter.zero_()
    torch.testing.assert_close(model(tensors["tokens"]), tensors["logits"], **FP32)
