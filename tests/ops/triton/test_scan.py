"""The scan kernels equal the recurrence in fp64, over several chunks and tiles, with and without the optional parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.ops.scan import selective_scan as plain
from megatron.ops.triton import scan
from tests.ops.triton.poison import poisoned

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = ("u", "delta", "a", "b", "c", "skip", "z", "bias")
BATCH, LENGTH, CHANNELS, STATES = 2, 11, 5, 3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of two tiles, the last tile cut short; two blocks of channels."""
    monkeypatch.setattr(scan, "CHUNK", 4)
    monkeypatch.setattr(scan, "TILE", 2)
    monkeypatch.setattr(scan, "CHANNELS", 4)


def draw(
    dtype: torch.dtype, device: torch.device, left_out: tuple[str, ...] = ()
) -> tuple[list[Tensor | None], Tensor]:
    """Return the arguments in order, those of tokens as views of wider rows, and the upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def of_tokens(width: int) -> Tensor:
        wide = torch.randn(BATCH, LENGTH, width + 2, generator=generator).to(device, dtype)
        return wide[..., 1 : width + 1]

    u, delta, z, upstream = (of_tokens(CHANNELS) for _ in range(4))
    b, c = of_tokens(STATES), of_tokens(STATES)
    a = -torch.rand(CHANNELS, STATES, generator=generator).to(device) * 4 - 0.1
    skip, bias = (torch.randn(CHANNELS, generator=generator).to(device) for _ in range(2))
    arguments = dict(zip(NAMES, (u, delta, a, b, c, skip, z, bias), strict=True))
    return [None if name in left_out else arguments[name] for name in NAMES], upstream


def leaves(arguments: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in arguments]


def check(arguments: list[Tensor | None], upstream: Tensor, least: dict[str, float] | None = None) -> None:
    """Compare kernel and formula, outputs and all gradients; least: absolute errors allowed anyway."""
    exact, ours = leaves(arguments, torch.float64), leaves(arguments)
    expected = plain(*exact)
    expected.backward(upstream.double())
    with poisoned():
        result = scan.selective_scan(*ours)
        result.backward(upstream)
    tolerance = TOLERANCES[upstream.dtype]
    assert result.dtype == upstream.dtype
    torch.testing.assert_close(result.double(), expected.detach(), rtol=tolerance, atol=2 * tolerance)
    for name, leaf, twin in zip(NAMES, ours, exact, strict=True):
        if leaf is None:
            continue
        assert leaf.grad.dtype == leaf.dtype, name
        allowed = max(tolerance * float(twin.grad.abs().max()), (least or {}).get(name, 0.0))
        error = float((leaf.grad.double() - twin.grad).abs().max())
        assert error <= allowed, f"the gradient of {name} is off by {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_everything(dtype: torch.dtype, device: torch.device) -> None:
    check(*draw(dtype, device))


@pytest.mark.parametrize("left_out", [("z",), ("skip", "bias"), ("skip", "z", "bias")])
def test_optional_parts(left_out: tuple[str, ...], device: torch.device) -> None:
    check(*draw(torch.float32, device, left_out))


def test_states_that_are_forgotten_at_once_and_never(device: torch.device) -> None:
    """Decays that underflow to 0 within a chunk, and steps so small that their softplus is below 1 + eps."""
    arguments, upstream = draw(torch.float32, device)
    arguments[1] = torch.where(arguments[1] > 0, arguments[1] + 60, arguments[1] - 30)
    # The gradient of A is a sum of g d exp(d A) h, and exp(d A) h the difference of two states of 60 u B.
    check(arguments, upstream, least={"a": 1e-6 * 60**2})


def test_one_token(device: torch.device) -> None:
    arguments, upstream = draw(torch.float32, device)
    short = [each[:, :1] if each is not None and each.dim() == 3 else each for each in arguments]
    check(short, upstream[:, :1])


def test_a_token_depends_on_no_later_one(device: torch.device) -> None:
    arguments, _ = draw(torch.float32, device)
    first = scan.selective_scan(*arguments)
    changed = [each.clone() for each in arguments]
    for index in (0, 1, 3, 4, 6):
        changed[index][:, 6:] = 100.0
    assert torch.equal(scan.selective_scan(*changed)[:, :6], first[:, :6])


def test_the_operators_are_registered_well(device: torch.device) -> None:
    arguments, upstream = draw(torch.float32, device)
    cut = [each[:1, :3] if each.dim() == 3 else each for each in arguments]
    _, starts, sums = scan.selective_scan_forward(*cut)
    torch.library.opcheck(scan.selective_scan_forward, tuple(cut))
    torch.library.opcheck(scan.selective_scan_backward, (upstream[:1, :3], *cut, starts, sums))
