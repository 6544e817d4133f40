"""The adapters of libraries that are not installed here, on stand-ins with the libraries' own signatures.

A stand-in computes what the library documents for each argument, among them those that we must not leave at their
defaults; so an argument in a wrong place gives a wrong number. Signatures: Liger-Kernel 0.8, Transformer Engine 2,
apex's master branch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import adamw, choice
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Situation

CPU = torch.device("cpu")


def _rms(x: Tensor, w: Tensor, eps: float, offset: float, mode: str) -> Tensor:
    assert mode in ("llama", "gemma", "none")
    values = x.float()
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return ((normed if mode == "gemma" else normed.to(x.dtype)) * (offset + w)).to(x.dtype)


class LigerRMSNormFunction:
    @staticmethod
    def apply(
        x: Tensor, w: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:  # fmt: skip
        assert casting_mode == "gemma", "llama rounds before the gains"
        assert not in_place, "the gradient that arrives is not ours alone"
        return _rms(x, w, eps, offset, casting_mode)


class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(
        x: Tensor, r: Tensor, w: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama",
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert casting_mode == "gemma"
        assert not in_place
        return _rms(x + r, w, eps, offset, casting_mode), x + r


class LigerLayerNormFunction:
    @staticmethod
    def apply(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w, b, eps)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
        assert not a.is_contiguous(), "the gradient would be written over the caller's inputs"
        return F.silu(a * gate_multiplier) * b * down_multiplier


def layernorm_fwd(
    inputs: Tensor, weight: Tensor, bias: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: str, sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:  # fmt: skip
    assert inputs.dim() == 2
    assert inputs.is_contiguous()
    assert (ln_out, quantizer, otype, sm_margin) == (None, None, str(inputs.dtype), 0)
    return list(torch.native_layer_norm(inputs, weight.shape, weight + zero_centered_gamma, bias, eps))


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    gains = gamma + zero_centered_gamma
    return list(torch.ops.aten.native_layer_norm_backward(dz, x, gains.shape, mu, rsigma, gains, gains, [True] * 3))


def rmsnorm_fwd(
    inputs: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: str, sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:  # fmt: skip
    assert inputs.dim() == 2
    assert inputs.is_contiguous()
    assert (ln_out, quantizer, otype, sm_margin) == (None, None, str(inputs.dtype), 0)
    scale = torch.rsqrt(inputs.float().square().mean(-1) + eps)
    return [_rms(inputs, weight, eps, float(zero_centered_gamma), "gemma"), None, scale]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    normed, wide = x.float() * rsigma[:, None], dz.float() * (gamma.float() + zero_centered_gamma)
    dx = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * rsigma[:, None]
    return [dx.to(x.dtype), (dz.float() * normed).sum(0).to(gamma.dtype)]


def fused_layer_norm_affine(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Any,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    return F.layer_norm(inputs, normalized_shape, weight, bias, eps)


def fused_rms_norm_affine(
    inputs: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    return F.rms_norm(inputs, normalized_shape, weight, eps)


def multi_tensor_applier(op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: Any, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size: int, noop_flag: Tensor, tensor_lists: Any, per_tensor: bool | None) -> Any:
    assert noop_flag.dtype == torch.int32
    flat = torch.cat([tensor.flatten() for tensor in tensor_lists[0]])
    return flat.norm().view(1), torch.empty(0)


def multi_tensor_adam_capturable(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Any, lr: Tensor, beta1: float, beta2: float, epsilon: float,
    step: Tensor, mode: int, bias_correction: int, weight_decay: float, inv_scale: Tensor,
) -> None:  # fmt: skip
    assert (noop_flag.dtype, step.dtype, lr.dtype, inv_scale.dtype) == (torch.int32, torch.int32, *[torch.float32] * 2)
    if noop_flag.item() == 1:
        return
    first, second = (1 - beta ** step.item() if bias_correction else 1.0 for beta in (beta1, beta2))
    for g, p, m, v in zip(*tensor_lists, strict=True):
        g.mul_(inv_scale)
        change = g if mode == 1 else g + weight_decay * p
        m.mul_(beta1).add_(change, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(change, change, value=1 - beta2)
        update = m / first / ((v / second).sqrt() + epsilon)
        p.sub_(lr * (update + weight_decay * p if mode == 1 else update))


LIBRARIES: dict[str, dict[str, Any]] = {
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
    "liger_kernel.ops.fused_add_rms_norm": {"LigerFusedAddRMSNormFunction": LigerFusedAddRMSNormFunction},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": LigerSiLUMulFunction},
    "transformer_engine_torch": {
        each.__name__: each for each in (layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd)
    },
    "transformer_engine.pytorch.constants": {
        "TE_DType": {dtype: str(dtype) for dtype in (torch.float32, torch.bfloat16)},
    },
    "apex.normalization.fused_layer_norm": {
        each.__name__: each for each in (fused_layer_norm_affine, fused_rms_norm_affine)
    },
    "apex.multi_tensor_apply": {"multi_tensor_applier": multi_tensor_applier},
    "amp_C": {each.__name__: each for each in (multi_tensor_l2norm, multi_tensor_adam_capturable)},
}  # fmt: skip
ADAPTERS = ("liger", "transformer_engine_norms", "apex_norms", "apex_adam")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins under the libraries' names, and adapters that are imported anew with them."""
    for path, contents in LIBRARIES.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            if name not in sys.modules or not hasattr(sys.modules[name], "is_stand_in"):
                module = ModuleType(name)
                module.__dict__.update(is_stand_in=True, __path__=[])
                monkeypatch.setitem(sys.modules, name, module)
        sys.modules[path].__dict__.update(contents)
    for adapter in ADAPTERS:
        monkeypatch.delitem(sys.modules, f"megatron.ops.{adapter}", raising=False)
    yield
    for adapter in ADAPTERS:
        sys.modules.pop(f"megatron.ops.{adapter}", None)


OFFERED = [
    (operation.name, candidate.name)
    for operation in CATALOGUE.values()
    for candidate in operation.candidates
    if candidate.place.split(":")[0].removeprefix("megatron.ops.") in ADAPTERS
]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("name", "library"), OFFERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_argument_of_an_adapter_arrives_where_the_library_has_it(
    name: str, library: str, dtype: torch.dtype
) -> None:
    operation = CATALOGUE[name]
    (candidate,) = [each for each in operation.candidates if each.name == library]
    assert choice._disagreement(operation, candidate, Situation(CPU, dtype, 24)) == ""


@pytest.mark.usefixtures("libraries")
def test_shapes_that_a_library_does_not_know_are_pytorchs() -> None:
    liger = importlib.import_module("megatron.ops.liger")
    row = torch.randn(1, 1, 8)
    assert torch.equal(liger.bias_swiglu(row, None), F.silu(row[..., 4:]) * row[..., :4])
    heads, gains = torch.randn(2, 3, 4), torch.ones(3, 4)
    for module in (liger, importlib.import_module("megatron.ops.transformer_engine_norms")):
        assert module.rms_norm(heads, gains, 1e-5).shape == heads.shape
        assert torch.equal(module.layer_norm(heads, (4,), None, None, 1e-5), F.layer_norm(heads, (4,)))


@pytest.mark.usefixtures("libraries")
def test_apexs_update_does_nothing_where_the_gradient_is_not_finite() -> None:
    apex = importlib.import_module("megatron.ops.apex_adam")
    lists = [[torch.full((3,), float(value))] for value in (1, 2, 3, 4)]
    apex.adamw_update_(*lists, [], torch.tensor(float("nan")), torch.tensor(2.0), 0.1, 0.9, 0.99, 1e-8, 0.0)
    assert [each[0].tolist() for each in lists[1:]] == [[2.0] * 3, [3.0] * 3, [4.0] * 3]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_apexs_update_takes_what_an_optimizer_gives(moments: torch.dtype) -> None:
    apex = importlib.import_module("megatron.ops.apex_adam")
    found, expected = (
        [[torch.full((3,), value)] for value in (1.0, 2.0)] + [[torch.full((3,), v).to(moments)] for v in (3.0, 4.0)]
        for _ in range(2)
    )
    numbers = (torch.tensor(1.0), torch.tensor(2.0), 0.1, 0.9, 0.99, 1e-8, 0.0, 7, 1)
    for update, lists in ((apex.adamw_update_, found), (adamw.adamw_update_, expected)):
        update(*lists, [], *numbers)
    torch.testing.assert_close(found, expected)
