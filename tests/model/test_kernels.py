"""Which operations a config's model has, what is said of them, and that ranks must choose alike."""

from __future__ import annotations

import logging
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from megatron.config.schema.kernels import KernelsConfig
from megatron.errors import ConfigError
from megatron.model.build import build_model
from megatron.model.kernels import choose_kernels, require_agreement
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Choice, Choices
from megatron.ops.measured import Fastest
from megatron.parallel.mesh import Axis, Mesh
from tests.model.models import VOCAB, random_tokens, small_config
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "operations"),
    [
        ({"gpt_j_residual": True}, {"layer_norm", "add_layer_norm", "rotate_packed", "bias_gelu"}),
        ({"pos_emb": "none", "activation": "relu", "precision": "fp8"},
         {"layer_norm", "add_layer_norm", "float8_linear"}),
        ({"norm": "rmsnorm", "pos_emb": "none", "activation": "swiglu"}, {"rms_norm", "add_rms_norm", "bias_swiglu"}),
        ({"norm": "scalenorm", "activation": "relu", "pos_emb": "none"}, set()),
        ({"gpt_j_residual": True, "bias_gelu_fusion": True, "hidden_dropout": 0.1},
         {"layer_norm", "add_layer_norm", "rotate_packed", "bias_gelu_tanh", "add_dropped"}),
    ],
)  # fmt: skip
def test_the_operations_of_a_model(settings: dict[str, Any], operations: set[str]) -> None:
    choices = choose_kernels(small_config(**settings), CPU, torch.float32)
    always = {"cross_entropy": "cpp", "attention": "cpp"}
    in_cpp = {"rotate_packed", "bias_gelu", "bias_gelu_tanh", "bias_swiglu"}
    in_cpp |= {"layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"}
    chosen = {choice.operation: choice.candidate for choice in choices.choices}
    assert chosen == {name: "cpp" if name in in_cpp else "eager" for name in operations} | always


def test_nothing_is_said_where_nothing_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="deepy.model.kernels"):
        choose_kernels(small_config(), CPU, torch.float32)
        assert caplog.text == ""
        choose_kernels(small_config(rope_fusion="triton"), CPU, torch.float32)
    assert "rotate_packed" in caplog.text
    assert "not triton" in caplog.text
    assert "needs a CUDA device, and this is cpu" in caplog.text


def test_ranks_that_choose_differently_are_told_so() -> None:
    def check() -> str:
        rank = dist.get_rank()
        refused = () if rank == 0 else (("triton", "PTXASError: no such file"),)
        choice = Choice("rms_norm", "triton" if rank == 0 else "eager", "", abs, refused)
        world = Axis("world", size=2, rank=rank, group=dist.group.WORLD)
        require_agreement(Choices((Choice("rotate_packed", "triton", "", abs),)), world)
        with pytest.raises(ConfigError) as caught:
            require_agreement(Choices((choice,)), world)
        return str(caught.value)

    for message in run_ranks(2, check):
        assert "rank 0 would use triton and rank 1 eager (triton: PTXASError: no such file)" in message


@pytest.mark.parametrize("operations", [None, ["activation", "attention"]])
def test_a_compiled_model_is_the_eager_one(operations: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In loss and gradients, and where its operations are computed again; traced here, without a C++ compiler."""
    compile_, traced = torch.compile, []

    def trace(function: Any) -> Any:
        traced.append(function)
        return compile_(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace)
    keys = ("rmsnorm_fusion", "rope_fusion", "activation_fusion")
    model = {"norm": "rmsnorm", "activation": "swiglu", "checkpoint_operations": operations}
    results = []
    for settings in ({}, {"checkpoint_activations": True, **dict.fromkeys(keys, "compile")}):
        decoder = build_model(small_config(**model, **settings), VOCAB, Mesh.single())
        tokens = random_tokens(rows=2, length=7)
        loss = torch.nn.functional.cross_entropy(decoder(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in decoder.parameters())])
    assert len(traced) == 8  # four operations, each with a copy for its probe
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_every_candidate_can_be_asked_for_by_its_operations_key() -> None:
    keys = {
        "layernorm_fusion": ("layer_norm", "add_layer_norm"),
        "rmsnorm_fusion": ("rms_norm", "add_rms_norm"),
        "rope_fusion": ("rotate_packed",),
        "activation_fusion": ("bias_gelu", "bias_gelu_tanh", "bias_swiglu", "bias_geglu"),
        "bias_dropout_fusion": ("add_dropped",),
        "cross_entropy_fusion": ("cross_entropy", "share_losses"),
        "optimizer_fusion": ("adamw_update_", "sum_of_squares"),
        "scaled_upper_triang_masked_softmax_fusion": ("masked_softmax",),
        "scaled_masked_softmax_fusion": ("masked_softmax",),
    }
    for key, operations in keys.items():
        names = {each.name for operation in operations for each in CATALOGUE[operation].candidates} - {"eager"}
        values = set(get_args(KernelsConfig.model_fields[key].annotation)) - {"auto", True, False}
        assert names == values, key


def test_fp8_on_a_gpu_without_it_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError) as caught:
        choose_kernels(small_config(precision="fp8"), torch.device("cuda", 0), torch.bfloat16)
    assert str(caught.value) == (
        'precision = "fp8": NVIDIA A100 has compute capability 8.0, and float8 products need 8.9 (Ada), 9.0 (Hopper) '
        "or later. Set precision: bf16"
    )


@pytest.mark.parametrize("operations", [(), tuple(CATALOGUE)])
def test_a_gpu_that_nothing_was_measured_on_is_said_with_what_to_run(
    operations: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tuple(Fastest("NVIDIA", operation, 0, "eager") for operation in operations)
    monkeypatch.setattr("megatron.ops.measured.read_rows", lambda: rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    with caplog.at_level(logging.INFO, logger="deepy.model.kernels"):
        choose_kernels(small_config(), torch.device("cuda", 0), torch.bfloat16)
    said = caplog.text
    assert "kernels on cuda:0:" in said
    assert ("run once, in some minutes, python benchmarks/kernels.py --write" in said) == (not operations)
    assert ("auto knows nothing of NVIDIA X" in said) == (not operations)
