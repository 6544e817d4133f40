"""`attention_backend` and the keys of the softmax decide what computes attention, and a table says what came of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config.draft import Setting
from megatron.config.resolve import resolve_settings
from megatron.model.attention_choice import attend, choose_attention, operations, part_kernels
from megatron.model.build import build_model
from megatron.model.kernels import choose_kernels
from megatron.ops import attention_dense, choice
from megatron.ops.attention_backend import Backend
from megatron.ops.choice import Choices
from megatron.ops.partial_attention import NO_KERNELS
from megatron.parallel.mesh import Mesh
from tests.model.models import SMALL, VOCAB, random_tokens, small_config

CPU = torch.device("cpu")
LOCAL = {"sliding_window_width": 3, "attention_config": [[["local", "global"], "all"]]}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"global": "attention"}),
        (LOCAL, {"global": "attention", "local": "attention window"}),
        ({"sliding_window_width": 3}, {"global": "attention window"}),
        ({"pos_emb": "alibi", **LOCAL}, {"global": "attention alibi", "local": "attention window alibi"}),
        ({"pos_emb": "rpe", "attention_dropout": 0.1}, {"global": "attention bias dropout"}),
    ],
)
def test_the_kinds_of_a_model(settings: dict[str, Any], names: dict[str, str]) -> None:
    found = operations(small_config(**settings))
    assert {kind: operation.name for kind, operation in found.items()} == names
    with_documents = operations(small_config(**settings), documents=True)
    assert all("documents" in operation.name for operation in with_documents.values())


def chosen(choices: Choices) -> dict[str, str]:
    return {each.operation: each.candidate for each in choices.choices}


@pytest.mark.parametrize(
    ("backend", "candidate", "line"),
    [
        ("auto", "cpp", "auto on cpu"),
        ("cpp", "cpp", "cpp was asked for"),
        ("sdpa", "sdpa", "sdpa was asked for"),
        ("dense", "dense", "dense was asked for"),
        ("triton", "sdpa", "needs a CUDA device, and this is cpu"),
        ("flash3", "sdpa", "needs a CUDA device, and this is cpu"),
    ],
)
def test_what_is_asked_for_on_a_cpu(backend: str, candidate: str, line: str) -> None:
    choices = choose_attention(small_config(attention_backend=backend), CPU, torch.float32)
    assert chosen(choices)["attention"] == candidate
    assert line in choices.table()


def test_what_auto_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured: what needs no mask of all pairs. The probe is another test's."""
    monkeypatch.setattr(choice, "_disagreement", lambda *_: "")
    monkeypatch.setattr("megatron.ops.measured.torch.cuda.get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(choice.Candidate, "load", lambda self: self.name)
    gpu = torch.device("cuda")
    found = chosen(choose_attention(small_config(**LOCAL), gpu, torch.bfloat16))
    assert found == {
        "attention": "sdpa", "attention window": "triton",
        "attention documents": "triton", "attention window documents": "triton",
    }  # fmt: skip
    dropping = chosen(choose_attention(small_config(attention_dropout=0.1, **LOCAL), gpu, torch.bfloat16))
    assert set(dropping.values()) == {"sdpa"}


def test_dense_takes_the_softmax_of_neoxs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key for its kind of mask: causal alone, or with a window."""
    config = small_config(
        attention_backend="dense", scaled_upper_triang_masked_softmax_fusion=True,
        scaled_masked_softmax_fusion=False, **LOCAL,
    )  # fmt: skip
    table = choose_kernels(config, CPU, torch.float32).table()
    assert "not triton   needs a CUDA device, and this is cpu" in table
    assert "masked_softmax                cpp          true was asked for" in table
    assert "masked_softmax within limits  eager        false was asked for" in table
    calls: list[str] = []
    made = attention_dense.masked_softmax

    def counting(name: str):
        return lambda *arguments: calls.append(name) or made(*arguments)

    monkeypatch.setattr(choice.Candidate, "load", lambda self, load=choice.Candidate.load: (
        counting(self.place) if "softmax" in self.place else load(self)))  # fmt: skip
    choices = choose_kernels(config, CPU, torch.float32)
    named = {each.operation: each for each in choices.choices}
    causal, limited = named["masked_softmax"], named["masked_softmax within limits"]
    assert causal.function is not limited.function
    model = build_model(config, VOCAB, Mesh.single(), choices=choices)
    calls.clear()  # of the probes
    model(random_tokens(1, 9))
    assert calls == ["megatron.ops.softmax:masked_softmax", "megatron.ops.cpu.softmax:masked_softmax"]  # local, global


@pytest.mark.parametrize(
    "settings", [{}, LOCAL, {"pos_emb": "alibi"}, {"pos_emb": "rpe"}, {"num_kv_heads": 2}], ids=str
)
def test_dense_changes_nothing(settings: dict[str, Any]) -> None:
    results = []
    segments = torch.tensor([[0] * 5 + [1] * 7, [3] * 9 + [4] * 3])
    for backend in ("sdpa", "dense"):
        model = build_model(small_config(attention_backend=backend, **settings), VOCAB, Mesh.single())
        logits = [model(random_tokens(2, 12)), model(random_tokens(2, 12), segments=segments)]
        sum(each.square().sum() for each in logits).backward()
        results.append([*logits, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_parts_of_a_ring_are_computed_by_what_was_chosen() -> None:
    config = small_config()
    kernel: Any = object()
    backend = Backend("own", lambda *_: torch.zeros(1), lambda *_: "", kernel)
    for name, place in (("attention", "plain"), ("attention documents", "limited")):
        choices = Choices((choice.Choice(name, "own", "", backend),))
        found = part_kernels(config, "global", choices)
        assert getattr(found, place) is kernel
        assert found._replace(**{place: None}) == NO_KERNELS
    assert part_kernels(config, "global", Choices()) == NO_KERNELS
    assert callable(attend(config, "global", Choices()))


@pytest.mark.parametrize(("backend", "told"), [("auto", True), ("dense", False)])
def test_keys_without_effect_are_told(backend: str, told: bool) -> None:
    settings = {**SMALL, "attention_backend": backend, "scaled_masked_softmax_fusion": True}
    notices = resolve_settings({key: Setting(value) for key, value in settings.items()}).notices
    sentence = "scaled_masked_softmax_fusion has no effect without attention_backend: dense."
    assert (sentence in notices) == told


@pytest.mark.parametrize("settings", [LOCAL, {"pos_emb": "alibi"}], ids=str)
@pytest.mark.parametrize("documents", [True, False])
def test_torch_compile_traces_attention_whole(settings: dict[str, Any], documents: bool) -> None:
    model = build_model(small_config(**settings), VOCAB, Mesh.single())
    segments = torch.tensor([[0] * 5 + [1] * 7]) if documents else None
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = random_tokens(1, 12)
    torch.testing.assert_close(compiled(tokens, segments=segments), model(tokens, segments=segments))
