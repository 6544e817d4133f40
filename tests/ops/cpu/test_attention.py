"""Blocks of attention with one pass between their products equal the formula, or say what they lack."""

from __future__ import annotations

import pytest
import torch

from megatron.ops import attention_cpu
from megatron.ops.attention import sight_reference
from megatron.ops.attention_backend import UnservedError
from megatron.ops.cpu import attention, library
from megatron.ops.sight import Sight
from tests.ops.sights import KINDS, compare, heads_of, sight_of

SERVED = [kind for kind in KINDS if kind != "bias"]
BLOCKED = [kind for kind in SERVED if "full" not in kind]

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture(scope="module")
def ready() -> None:
    assert library.make_ready(torch.device("cpu")) == ""


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.float16)]
)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (19, 40)])
def test_training(
    kind: str, kv_heads: int, dtype: torch.dtype, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", 16)
    monkeypatch.setattr(attention, "has_bf16", lambda: False)
    compare(attention.CPP, heads_of(kv_heads, queries, keys, dtype), sight_of(kind, queries, keys))


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_between_the_products_equals_pytorchs(kind: str, dtype: torch.dtype) -> None:
    sight = sight_of(kind, 37, 45)
    (block,) = attention_cpu.blocks_of(sight, 37, 45)
    generator = torch.Generator().manual_seed(0)
    size = block.keys.stop - block.keys.start
    found, gradient = (torch.randn(2, 4, 37, size, generator=generator).to(dtype) for _ in range(2))
    expected, rounding = found.float(), torch.finfo(dtype).eps
    attention.IN_ONE_PASS.probabilities_(found, block)
    attention_cpu.EAGER.probabilities_(expected, block)
    torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=rounding / 4)
    seen = sight.seen(torch.arange(8, 45), torch.arange(block.keys.start, 45))
    assert not found.masked_select(~seen.expand(found.shape)).any()
    wanted = attention_cpu.EAGER.gradient(gradient.float(), found.float(), block)
    given = attention.IN_ONE_PASS.gradient(gradient, found, block)
    assert given is gradient
    torch.testing.assert_close(given.float(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_short_sequences_in_bf16_are_whole_where_the_processor_has_products_of_them(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(attention, "has_bf16", lambda: has_bf16)
    called: list[int] = []
    whole = attention.flash_attention
    monkeypatch.setattr(attention, "flash_attention", lambda *args: called.append(1) or whole(*args))
    compare(attention.CPP, heads_of(4, 40, 40, torch.bfloat16), sight_of("causal", 40, 40))
    assert bool(called) == has_bf16


def test_sums_are_fp32() -> None:
    total = torch.full((3, 9, 5), 256.0)
    attention.IN_ONE_PASS.add_(total[:, 2:6], torch.full((3, 4, 5), 0.5, dtype=torch.bfloat16))
    assert total[:, 2:6].eq(256.5).all()
    assert total[:, :2].eq(256.0).all()
    assert total[:, 6:].eq(256.0).all()


def test_scores_that_are_no_numbers_or_infinite() -> None:
    (block,) = attention_cpu.blocks_of(Sight(1.0), 40, 40)
    scores = torch.randn(1, 1, 40, 40)
    scores[0, 0, 30, 7], scores[0, 0, 20, 3], scores[0, 0, 10, 11:] = float("nan"), -float("inf"), float("nan")
    attention.IN_ONE_PASS.probabilities_(scores, block)
    assert scores[0, 0, 30, :31].isnan().all()
    assert scores[0, 0, 20, 3] == 0.0
    assert scores[0, 0, [10, 20]].isfinite().all(), "what is not seen does not matter"


def test_threads_change_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            block = next(iter(attention_cpu.blocks_of(Sight(1.0), 100, 100)))
            scores = torch.randn(2, 4, 100, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
            gradient, total = scores.flip(0), torch.ones(8, 100, 100)
            attention.IN_ONE_PASS.probabilities_(scores, block)
            attention.IN_ONE_PASS.gradient(gradient, scores, block)
            attention.IN_ONE_PASS.add_(total, gradient.flatten(0, 1))
            results.append((scores, gradient, total))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_compiled_or_in_fp64_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel", None)
    compare(
        attention.CPP, [each.double() for each in heads_of(2, 20, 20, torch.float32)], Sight(0.3), rtol=1e-5, atol=1e-6
    )
    compiled = torch.compile(lambda *heads: attention.CPP(*heads, Sight(0.3)), backend="eager", fullgraph=True)
    query, key, value, upstream = heads_of(2, 20, 20, torch.float32)
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    exact = [each.detach().requires_grad_() for each in (query, key, value)]
    found, wanted = compiled(*leaves), sight_reference(*exact, Sight(0.3))
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        *(torch.autograd.grad(*pair, upstream) for pair in ((found, leaves), (wanted, exact))), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_says_what_it_cannot_do() -> None:
    query, key, value, _ = heads_of(4, 9, 9, torch.float32)
    with pytest.raises(UnservedError, match="cpp has no learned biases"):
        attention.CPP(query, key, value, sight_of("bias", 9, 9))
    with pytest.raises(UnservedError, match="cpp has no dropout"):
        attention.CPP(query, key, value, Sight(1.0), 0.1)
    assert attention.CPP.lacks(query.to("meta"), key, Sight(1.0), 0.0) == "needs a CPU, and this is meta"
