"""The attention kernels equal the formula in fp64, for whatever is seen, of odd shapes, and skip what is not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import sight_reference
from megatron.ops.partial_attention import merge_part
from megatron.ops.sight import Sight
from megatron.ops.triton import attention as kernels
from megatron.ops.triton.attention import BACKEND
from megatron.ops.triton.launch import recording
from tests.ops.sights import compare, heads_of, sight_of
from tests.ops.triton.interpreted import HAS_GPU
from tests.ops.triton.poison import poisoned

EXACT = {"rtol": 2e-5, "atol": 2e-5}


def some(tensors: list[Tensor], rows: int = 1) -> list[Tensor]:
    """Return two query heads, with their keys, of a few rows: each program takes 50 ms in the interpreter."""
    query, key, value, upstream = tensors
    keys = slice(0, 2 * key.shape[1] // query.shape[1] or 1)
    return [query[:rows, :2], key[:rows, keys], value[:rows, keys], upstream[:rows, :2]]


def seen_by(sight: Sight, rows: int = 1) -> Sight:
    """Return the same for these heads and rows."""
    slopes, segments, padding = sight.slopes, sight.segments, sight.padding
    return replace(
        sight,
        slopes=None if slopes is None else slopes[:2],
        segments=None if segments is None else segments[:rows],
        padding=None if padding is None else padding[2 - rows :],
    )


def check(tensors: list[Tensor], sight: Sight, **tolerance: float) -> None:
    """Compare output and gradients with the formula's, in poisoned memory."""

    def attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, dropout: float = 0.0) -> Tensor:
        with poisoned():
            return BACKEND(query, key, value, sight, dropout)

    backward = torch.autograd.grad

    def in_poison(*arguments):
        with poisoned():
            return backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.autograd,
            "grad",
            lambda output, *rest: (in_poison if output.dtype != torch.float64 else backward)(output, *rest),
        )
        compare(attend, tensors, sight, **tolerance)


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "alibi", "padding", "documents window alibi"])
def test_what_is_seen(kind: str, device: torch.device) -> None:
    """37 tokens are two blocks of 16 and a rest; two query heads share a key."""
    rows = 2 if kind == "documents" else 1
    tensors = some(heads_of(2, 37, 37, torch.float32, device), rows)
    check(tensors, seen_by(sight_of(kind, 37, 37, device), rows), **EXACT)


@pytest.mark.parametrize("kind", ["full", "full documents"])
def test_what_is_not_causal(kind: str, device: torch.device) -> None:
    check(some(heads_of(4, 20, 35, torch.float32, device)), seen_by(sight_of(kind, 20, 35, device)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, device: torch.device) -> None:
    check(some(heads_of(1, 33, 33, dtype, device)), sight_of("window", 33, 33, device))


@pytest.mark.parametrize("dim", [1, 40, 80, 100, 256])
def test_heads_of_any_size(dim: int, device: torch.device) -> None:
    tensors = some(heads_of(4, 17, 17, torch.float32, device, dim))
    check(tensors, sight_of("causal", 17, 17, device, 0.1), **EXACT)


@pytest.mark.parametrize(("queries", "keys"), [(1, 33), (5, 33), (20, 17)])
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_queries_are_the_last_of_the_keys(queries: int, keys: int, kind: str, device: torch.device) -> None:
    tensors, sight = some(heads_of(2, queries, keys, torch.float32, device)), sight_of(kind, queries, keys, device)
    if queries <= keys:
        check(tensors, sight, **EXACT)
        return
    query, key, value, upstream = (each.detach().requires_grad_() for each in tensors)  # the first queries see nothing
    unseen, output = queries - keys, kernels.attention(query, key, value, sight)
    assert (output[:, :, :unseen] == 0).all()
    found = torch.autograd.grad(output, (query, key, value), upstream)
    assert (found[0][:, :, :unseen] == 0).all()
    seen = [query[:, :, unseen:], key, value]
    wanted = sight_reference(*seen, sight)
    torch.testing.assert_close(output[:, :, unseen:], wanted, **EXACT)
    expected = torch.autograd.grad(wanted, (query, key, value), upstream[:, :, unseen:])
    torch.testing.assert_close(found, expected, **EXACT)


def test_features_that_lie_apart(device: torch.device) -> None:
    """Only then the kernel copies; else it takes what strides there are, and gives rows of tokens."""
    query, key, value, _ = some(heads_of(4, 9, 9, torch.float32, device))
    apart = torch.stack([query, query], dim=-1)[..., 0]
    assert apart.stride(3) == 2
    output = kernels.attention(apart, key.contiguous(), value, Sight(0.3))
    torch.testing.assert_close(output, sight_reference(query, key, value, Sight(0.3)), **EXACT)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["window", "documents", "padding"])
def test_what_is_not_seen_is_not_read(kind: str, device: torch.device) -> None:
    """NaN in blocks that no query sees changes nothing, forward or backward: they are skipped, not masked."""
    sight = sight_of(kind, 64, 64, device)
    if kind == "window":
        sight = replace(sight, window=5)
    query, key, value, upstream = some(heads_of(2, 64, 64, torch.float32, device))
    if kind == "documents":
        sight = replace(sight, segments=(torch.arange(64, device=device) // 32).expand(1, 64))
    elif kind == "padding":
        sight = replace(sight, padding=torch.tensor([32], device=device))
    last = slice(48, None)
    keys = [each.clone() for each in (key, value)]
    for each in keys:
        each[:, :, :16] = float("nan")
    results = []
    for these in ([key, value], keys):
        leaves = [query[:, :, last].detach().requires_grad_(), *(each.detach().requires_grad_() for each in these)]
        output = kernels.attention(*leaves, sight)
        results.append([output, *torch.autograd.grad(output, leaves, upstream[:, :, last])])
    assert (sight.bounds(16, 64, device).first >= 16).all()
    for one, other in zip(*results, strict=True):
        assert not other.isnan().any()
        assert torch.equal(one, other)


def test_results_are_the_same_in_every_run(device: torch.device) -> None:
    query, key, value, upstream = some(heads_of(1, 20, 20, torch.float32, device))
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    runs = [torch.autograd.grad(kernels.attention(*leaves, Sight(0.3)), leaves, upstream) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_parts_and_their_log_sums_make_the_whole(device: torch.device) -> None:
    query, key, value, upstream = some(heads_of(2, 24, 24, torch.float32, device))
    columns = torch.arange(24, device=device)
    sight = seen_by(sight_of("documents window", 24, 24, device))
    output = torch.zeros(query.shape, device=device)
    lse = torch.full(query.shape[:3], float("-inf"), device=device)
    parts = [
        (slice(0, 9), sight.bounds_of(columns, columns[:9])),
        (slice(9, 24), sight.bounds_of(columns, columns[9:])),
    ]
    assert BACKEND.parts is not None
    for part, bounds in parts:
        merge_part(output, lse, *BACKEND.parts.forward(query, key[:, :, part], value[:, :, part], 0.3, False, bounds))
    exact = [each.detach().requires_grad_() for each in (query, key, value)]
    wanted = sight_reference(*exact, sight)
    torch.testing.assert_close(output, wanted.detach(), **EXACT)
    of_query, of_key, of_value = torch.autograd.grad(wanted, exact, upstream)
    total = torch.zeros_like(query)
    for part, bounds in parts:
        settings = (output, lse, 0.3, False, bounds)
        found = BACKEND.parts.backward(upstream, query, key[:, :, part], value[:, :, part], *settings)
        total += found.query
        torch.testing.assert_close(found.key, of_key[:, :, part], **EXACT)
        torch.testing.assert_close(found.value, of_value[:, :, part], **EXACT)
    torch.testing.assert_close(total, of_query, **EXACT)


def test_the_operators_are_registered_well(device: torch.device) -> None:
    query, key, value, upstream = some(heads_of(2, 5, 5, torch.float32, device))
    sight = seen_by(sight_of("documents alibi", 5, 5, device))
    bounds = sight.bounds(5, 5, device)
    settings = (sight.slopes, 0.3, True, kernels.FAR)
    output, lse = kernels.attention_forward(query, key, value, *bounds[:2], *settings)
    torch.library.opcheck(kernels.attention_forward, (query, key, value, *bounds[:2], *settings))
    arguments = (upstream, query, key, value, output, lse, *bounds, *settings)
    torch.library.opcheck(kernels.attention_backward, arguments)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_tiles_are_those_of_the_architecture(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    tiles = {}
    for arch in (80, 90):
        with recording(arch) as launches:
            kernels._sample(4, 2, dim, torch.bfloat16, Sight(0.1, window=99), torch.device("meta"))
        names = [launch.kernel.fn.__name__ for launch in launches]
        assert names == ["forward", "query_gradient", "key_gradient"]
        tiles[arch] = [(each.constants["QUERIES"], each.constants["KEYS"]) for each in launches]
        assert launches[0].grid == (-(-2048 // tiles[arch][0][0]), 4, 4)
        assert launches[2].grid == (-(-2048 // tiles[arch][2][1]), 2, 4)
        assert all(each.constants["FRONT"] + each.constants["BACK"] == dim for each in launches)
    assert tiles[80] != tiles[90]


def test_what_the_kernel_cannot_do() -> None:
    query, key, _, _ = heads_of(4, 33, 33, torch.float32)
    assert BACKEND.lacks(query, key, Sight(1.0), 0.1) == "has no dropout"
    assert BACKEND.lacks(query, key, sight_of("bias", 33, 33), 0.0) == "has no learned biases"
    assert "fewer than 16 queries" in BACKEND.lacks(query[:, :, :3], key, Sight(1.0), 0.0)
    wide = torch.empty(1, 1, 16, 264)
    assert BACKEND.lacks(wide, wide, Sight(1.0), 0.0) == "takes heads of up to 256 features, and not 264"
    assert BACKEND.lacks(query, key, sight_of("documents window alibi", 33, 33), 0.0) == ""


TRAINED = [
    (64, "causal", torch.bfloat16), (80, "window", torch.bfloat16), (96, "causal", torch.float16),
    (128, "documents window alibi", torch.bfloat16), (256, "causal", torch.bfloat16), (64, "causal", torch.float32),
]  # fmt: skip


@pytest.mark.skipif(not HAS_GPU, reason="sizes of training need a GPU")
@pytest.mark.parametrize(("dim", "kind", "dtype"), TRAINED)
def test_sizes_of_training(dim: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(BACKEND, heads_of(2, 1037, 1037, dtype, device, dim), sight_of(kind, 1037, 1037, device, dim**-0.5))
