"""Activations that travel: the same gradients bit by bit, each storage once, and those of two blocks near at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config.resolve import resolve
from megatron.model import offload
from megatron.model.build import build_model
from megatron.model.offload import Offload, _Copier
from megatron.parallel.mesh import Mesh
from tests.model.test_recompute import KINDS, MODELS

VOCAB = 40
ON = {"offload_activations": True}
LAYERS = 5


class Counting(_Copier):
    """Counts bytes on their way, by storage, and what is away at most."""

    def __init__(self) -> None:
        self.out_bytes = self.back_bytes = 0
        self.events: list[str] = []

    def out(self, source: torch.Tensor) -> torch.Tensor:
        self.out_bytes += source.numel()
        self.events.append("out")
        return source.clone()

    def back(self, away: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, None]:
        self.back_bytes += away.numel()
        self.events.append("back")
        return away.clone(), None


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    copier = Counting()
    monkeypatch.setattr(offload, "SMALLEST", 300)
    monkeypatch.setattr(Offload, "_copier", lambda self, device: copier)
    return copier


def run(**keys: Any) -> dict[str, torch.Tensor]:
    values = {
        "num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16,
        "max_position_embeddings": 16, "hidden_dropout": 0.1, "attention_dropout": 0.2, "precision": "fp32",
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "adam", "params": {"lr": 1e-3}},
    }  # fmt: skip
    model = build_model(resolve({**values, **keys}), VOCAB, Mesh.single())
    text = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model(text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(2, 16)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [None, "blocks", "pairs of blocks", "norm", "all"])
def test_no_gradient_changes(name: str, kind: str | None, counting: Counting) -> None:
    keys = {**MODELS[name], **(KINDS[kind] if kind else {})}
    plain, travelled = run(**keys), run(**keys, **ON)
    assert all(torch.equal(plain[parameter], travelled[parameter]) for parameter in plain)
    assert counting.out_bytes > 0
    assert 0 < counting.back_bytes <= counting.out_bytes


def test_blocks_leave_and_return_in_turn(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks but the last travel; the latest two are still there when the backward pass asks for them."""
    near = []
    block = Offload.block

    def watched(self: Offload, *inputs: Any) -> Any:
        near.append(len(self._near))
        return block(self, *inputs)

    monkeypatch.setattr(Offload, "block", watched)
    run(**MODELS["llama"], **ON, hidden_dropout=0.0)
    assert len(near) == LAYERS - 1
    assert max(near) <= offload.NEAR
    assert counting.events.index("back") > len(counting.events) - 1 - counting.events[::-1].index("out")
    share = counting.back_bytes / counting.out_bytes
    assert share == pytest.approx((LAYERS - 1 - offload.NEAR) / (LAYERS - 1), abs=0.05)


def test_a_storage_travels_once_and_views_are_found_in_it(counting: Counting) -> None:
    mover, weight = Offload(), torch.nn.Parameter(torch.randn(16, 16))
    inputs = torch.randn(16, 16, requires_grad=True)
    forward = mover.start()
    with mover.block(forward, torch.device("cpu")):
        base = inputs * 2
        left, right = base[:, :8], base[:, 8:]
        result = (left * right).sum() + (base @ weight).sum() + (base * base).sum()
    assert counting.out_bytes == 16 * 16 * 4
    mover.block(forward, torch.device("cpu")).__enter__()
    del base, left, right
    mover._near.popleft().leave()
    result.backward()
    assert counting.back_bytes == counting.out_bytes
    twice = inputs.detach() * 2
    expected = 2 * (torch.cat([twice[:, 8:], twice[:, :8]], 1) + weight.detach().sum(1) + 2 * twice)
    torch.testing.assert_close(inputs.grad, expected)


def test_small_tensors_and_parameters_stay(counting: Counting) -> None:
    mover, weight = Offload(), torch.nn.Parameter(torch.randn(16, 16))
    with mover.block(mover.start(), torch.device("cpu")):
        (torch.ones(2, 16, requires_grad=True) @ weight).exp()
    assert counting.out_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_two_blocks() -> None:
    """Peak memory falls by what the other blocks keep, and gradients stay the same bit by bit."""
    values = {
        "num_layers": 12, "hidden_size": 1024, "num_attention_heads": 8, "seq_length": 1024, "precision": "bf16",
        "max_position_embeddings": 1024, "train_micro_batch_size_per_gpu": 8, "pos_emb": "rotary",
        "optimizer": {"type": "adam", "params": {"lr": 1e-3}},
        "attention_backend": "triton",  # flash-attn's backward pass sums in another order each time
    }  # fmt: skip
    peaks, gradients = [], []
    for keys in ({}, ON):
        model = build_model(resolve({**values, **keys}), 512, Mesh.single(torch.device("cuda")))
        text = torch.randint(0, 512, (8, 1025), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(text[:, :-1], labels=text[:, 1:], loss_mask=torch.ones(8, 1024, device="cuda")).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        del model
        torch.cuda.empty_cache()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert peaks[1] < 0.5 * peaks[0]
