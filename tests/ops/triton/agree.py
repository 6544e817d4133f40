"""What kernel tests share: a kernel against its formula in fp64, forward and backward, in poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.triton.poison import poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two steps of the dtype: the interpreter cuts fp32 to bf16 where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return leaves of the given shapes."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def scattered(tensor: Tensor) -> Tensor:
    """Return the same values in memory where rows lie apart and every second element is another's."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    view = wide.to(tensor.device)[..., : 2 * tensor.shape[-1] : 2]
    view.copy_(tensor.detach())
    return view.requires_grad_()


def check(
    kernel: Callable[..., Tensor | Sequence[Tensor]],
    formula: Callable[..., Tensor | Sequence[Tensor]],
    leaves: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """Compare outputs and gradients of kernel(*leaves) with those of formula on the same values in fp64."""
    dtype = leaves[0].dtype
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = as_tuple(formula(*exact))
    upstream = [torch.randn(each.shape, generator=torch.Generator().manual_seed(3)).to(dtype) for each in expected]
    upstream = [each.to(leaves[0].device) for each in upstream]
    with poisoned():
        outputs = as_tuple(kernel(*leaves))
        found = torch.autograd.grad(outputs, leaves, upstream)
    wanted = torch.autograd.grad(expected, exact, [each.double() for each in upstream])
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    for one, other in zip([*outputs, *found], [*expected, *wanted], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=allowed, atol=allowed * max(1.0, float(other.abs().max())))


def as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one tensor or several as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
