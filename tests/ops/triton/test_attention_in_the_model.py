"""A model whose attention is the kernel's equals the eager one: trained, recomputed, decoding and over two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from megatron.model.attention_choice import choose_attention
from megatron.model.build import build_model
from megatron.model.cache import KVCache
from megatron.ops import choice, probes
from megatron.ops.attention import sight_reference
from megatron.ops.attention_operation import attention_operation
from megatron.ops.choice import Candidate, Choices, Situation
from megatron.ops.partial_attention import PartKernels
from megatron.ops.sight import Sight
from megatron.ops.triton import attention as kernels
from megatron.parallel.context import positions_of, ring_attention
from megatron.parallel.mesh import Mesh
from tests.model.models import VOCAB, random_tokens, small_config
from tests.ops.sights import heads_of, sight_of
from tests.ops.triton.interpreted import HAS_GPU
from tests.ranks import run_ranks

LOCAL = {"num_attention_heads": 2, "sliding_window_width": 3, "attention_config": [[["local", "global"], "all"]]}
SETTINGS: dict[str, dict[str, Any]] = {
    "local": LOCAL,
    "alibi": {"pos_emb": "alibi", "num_attention_heads": 2, "num_kv_heads": 1},
    "recomputed": {**LOCAL, "checkpoint_activations": True, "checkpoint_operations": ["attention"]},
}


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels may be chosen where they are interpreted, after a short probe."""
    monkeypatch.setattr(Candidate, "obstacle", lambda self, situation: "")
    monkeypatch.setattr(probes, "_TOKENS", 5)


@pytest.fixture
def unprobed(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without it."""
    monkeypatch.setattr(choice, "_disagreement", lambda *_: "")


@pytest.mark.parametrize("features", [["window"], ["documents", "alibi"]], ids=str)
def test_the_probe_accepts_the_kernel(features: list[str], device: torch.device, anywhere: None) -> None:
    operation = attention_operation(features)
    (kernel,) = [each for each in operation.candidates if each.name == "triton"]
    assert choice._disagreement(operation, kernel, Situation(device, torch.bfloat16, 8)) == ""


@pytest.mark.parametrize("feature", ["window", "documents", "alibi", "bias"])
def test_the_probe_refuses_what_knows_nothing_of_a_feature(
    feature: str, device: torch.device, anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
        return sight_reference(query, key, value, Sight(sight.scale))

    load = Candidate.load
    monkeypatch.setattr(Candidate, "load", lambda self: plain if self.name == "wrong" else load(self))
    operation = attention_operation([feature])
    found = choice._disagreement(operation, Candidate("wrong", ""), Situation(device, torch.float32, 8))
    assert found.startswith("differs from the formula by ")


def test_the_probe_passes_on_what_a_back_end_says(device: torch.device, anywhere: None) -> None:
    operation = attention_operation(["bias"])
    (kernel,) = [each for each in operation.candidates if each.name == "triton"]
    found = choice._disagreement(operation, kernel, Situation(device, torch.float32, 8))
    assert found == "UnservedError: triton has no learned biases"


def run(settings: dict[str, Any], choices: Choices, device: torch.device) -> list[Tensor]:
    """Return loss and gradients of a row of two documents."""
    model = build_model(small_config(**settings), VOCAB, Mesh.single(device), choices=choices)
    tokens, segments = random_tokens(1, 9).to(device), torch.tensor([[0] * 4 + [1] * 5], device=device)
    loss = torch.nn.functional.cross_entropy(model(tokens, segments=segments).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_is_the_same(
    name: str, device: torch.device, unprobed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(attention_backend="triton", **SETTINGS[name])
    choices = choose_attention(config, device, torch.float32)
    assert {each.candidate for each in choices.choices} == {"triton"}
    calls: list[int] = []
    forward = kernels.attention_forward
    monkeypatch.setattr(kernels, "attention_forward", lambda *given: calls.append(given[-1]) or forward(*given))
    expected = run(SETTINGS[name], Choices(), device)
    assert calls == []
    torch.testing.assert_close(run(SETTINGS[name], choices, device), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (4 if name == "recomputed" else 2)


def test_a_prompt_with_padding_and_what_follows_it(
    device: torch.device, unprobed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes the prompt, and PyTorch's attention single tokens."""
    config = small_config(attention_backend="triton", num_layers=1, sliding_window_width=3)
    tokens, padding = random_tokens(2, 19).to(device), torch.tensor([0, 5])
    counts: list[int] = []
    logits, forward = [], kernels.attention_forward
    monkeypatch.setattr(
        kernels, "attention_forward", lambda *given: counts.append(given[0].shape[2]) or forward(*given)
    )
    for choices in (Choices(), choose_attention(config, device, torch.float32)):
        counts.clear()
        model = build_model(config, VOCAB, Mesh.single(device), choices=choices)
        cache = KVCache(config.model, 2, 20, device, torch.float32)
        cache.set_padding(padding)
        with torch.inference_mode():
            logits.append(torch.cat([model(tokens[:, :18], cache=cache), model(tokens[:, 18:], cache=cache)], dim=1))
    assert counts == [18]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_torch_compile_keeps_the_kernel_whole(device: torch.device) -> None:
    query, key, value, _ = (each[:1] for each in heads_of(2, 17, 17, torch.float32, device))
    sight, operators = Sight(0.3, window=3, segments=torch.arange(17, device=device)[None] // 6), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        operators.extend(str(node.target) for node in graph.graph.nodes if "deepy" in str(node.target))
        return graph.forward

    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    compiled = torch.compile(kernels.BACKEND, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    output = compiled(*leaves, sight)
    found = torch.autograd.grad(output.sum(), leaves)
    assert operators == ["deepy.attention_forward.default", "deepy.attention_backward.default"]
    wanted = kernels.attention(*leaves, sight)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), leaves))


@pytest.mark.skipif(HAS_GPU, reason="the ranks of this test are processes on CPUs")
@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_the_ring_of_two_ranks(kind: str) -> None:
    length, parts = 24, PartKernels(kernels.BACKEND.parts, kernels.BACKEND.parts)
    whole, sight = [each[:1, :2] for each in heads_of(4, length, length, torch.float32)], sight_of(kind, length, length)
    if sight.segments is not None:
        sight = Sight(0.3, segments=sight.segments[:1])

    def rank() -> list[Tensor]:
        axis = Mesh.create(cp=2).cp
        mine = positions_of(axis.rank, 2, length)
        *leaves, upstream = [each[:, :, mine].contiguous().requires_grad_() for each in whole]
        output = ring_attention(*leaves, sight, axis, parts)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    exact = [each.detach().requires_grad_() for each in whole[:3]]
    wanted = sight_reference(*exact, sight)
    wanted = [wanted.detach(), *torch.autograd.grad(wanted, exact, whole[3])]
    for number, found in enumerate(run_ranks(2, rank)):
        mine = positions_of(number, 2, length)
        torch.testing.assert_close(found, [each[:, :, mine] for each in wanted], rtol=1e-5, atol=2e-6)
