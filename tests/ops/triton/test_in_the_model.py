"""A model in which every kernel is forced on equals the eager model, in loss and in all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.build import build_model
from megatron.model.compiled import compile_blocks
from megatron.model.kernels import choose_kernels
from megatron.ops import dropout_add
from megatron.ops.choice import Candidate, Choice, Choices
from megatron.ops.fp8 import obstacle
from megatron.parallel.mesh import Mesh
from tests.model.models import VOCAB, random_tokens, small_config

KEYS = ("layernorm_fusion", "rmsnorm_fusion", "rope_fusion", "activation_fusion", "bias_dropout_fusion")
NEOX = {"gpt_j_residual": True, "activation": "gelu"}
GPT2 = {"bias_gelu_fusion": True, "hidden_dropout": 0.2, "use_bias_in_norms": False}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "rotary_pct": 1.0,
    "num_kv_heads": 2,
    "use_bias_in_mlp": False,
    "use_bias_in_attn_linear": False,
}
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "neox": (NEOX, {"layer_norm", "rotate_packed", "bias_gelu"}),
    "gpt2": (GPT2, {"layer_norm", "add_layer_norm", "rotate_packed", "bias_gelu_tanh", "add_dropped"}),
    "llama": (LLAMA, {"rms_norm", "add_rms_norm", "rotate_packed", "bias_swiglu"}),
    "heads": ({"activation": "geglu", "use_qk_layernorm": True}, {"bias_geglu"}),
}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels may be chosen where they are interpreted, and none but them and PyTorch's."""
    others = {"apex", "liger", "cpp"}
    monkeypatch.setattr(Candidate, "obstacle", lambda self, situation: "not here" if self.name in others else "")


def eager(seeded: bool) -> Choices:
    """PyTorch's own of everything. seeded: dropout draws the kernel's seeds, and takes the formula's masks."""

    def add_dropped(hidden: Tensor, bias: Tensor | None, residual: Tensor, probability: float) -> Tensor:
        seed = dropout_add.new_seed(hidden.device)
        return dropout_add.add_dropped_reference(hidden, bias, residual, probability, seed)

    return Choices((Choice("add_dropped", "formula", "", add_dropped),) if seeded else ())


def loss_and_gradients(settings: dict[str, Any], choices: Choices, device: torch.device) -> list[Tensor]:
    model = build_model(small_config(**settings), VOCAB, Mesh.single(device), choices=choices)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    torch.manual_seed(11)
    tokens = random_tokens(rows=2, length=7).to(device)
    loss = torch.nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_forced_kernels_change_nothing(name: str, device: torch.device) -> None:
    settings, operations = MODELS[name]
    config = small_config(**settings, **dict.fromkeys(KEYS, True))
    choices = choose_kernels(config, device, torch.float32)
    candidates = {choice.operation: choice.candidate for choice in choices.choices}
    assert {operation: candidates[operation] for operation in operations} == dict.fromkeys(operations, "triton")
    expected = loss_and_gradients(settings, eager(seeded=True), device)
    torch.testing.assert_close(loss_and_gradients(settings, choices, device), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_compiled_blocks_of_kernels_change_nothing_either(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by torch.compile; code of the rest is generated on a GPU only."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    settings, _ = MODELS[name]
    config = small_config(**settings, **dict.fromkeys(KEYS, True))
    choices = choose_kernels(config, device, torch.float32)
    expected = loss_and_gradients(settings, choices, device)
    counted: list[int] = []

    plain = build_model

    def compiled(*arguments: Any, **keys: Any) -> Any:
        model = plain(*arguments, **keys)
        counted.append(compile_blocks(model, backend))
        return model

    monkeypatch.setitem(loss_and_gradients.__globals__, "build_model", compiled)
    found = loss_and_gradients(settings, choices, device)
    assert counted[0] > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fp8_by_kernels_is_fp8_by_pytorch_bit_by_bit(device: torch.device) -> None:
    if obstacle(device):
        pytest.skip(obstacle(device))
    settings = {**NEOX, "precision": "fp8", "fp8_fusion": "triton"}
    choices = choose_kernels(small_config(**settings, **dict.fromkeys(KEYS, False)), device, torch.bfloat16)
    assert choices.fused("float8_linear") is not None
    results = [loss_and_gradients(settings, each, device) for each in (choices, eager(seeded=False))]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("operations", [None, ["activation", "attention"]])
def test_recomputation_repeats_what_the_kernels_drew(operations: list[str] | None, device: torch.device) -> None:
    choices = choose_kernels(small_config(**GPT2, **dict.fromkeys(KEYS, "triton")), device, torch.float32)
    plain = loss_and_gradients(GPT2, choices, device)
    recomputing = GPT2 | {"checkpoint_activations": True, "checkpoint_operations": operations}
    torch.testing.assert_close(loss_and_gradients(recomputing, choices, device), plain, rtol=1e-5, atol=1e-6)
