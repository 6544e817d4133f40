"""The adapters of flash-attn give its functions what they document, and make of their results what was asked for.

The functions below have the signatures of flash-attn 2.8 (`flash_attn/flash_attn_interface.py`) and of 3
(`hopper/flash_attn_interface.py`) and compute what their documentation says, by a formula of their own: row i of q sees
the keys between i + s - q - left and i + s - q + right, and none beyond i + s - q where causal.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron.ops import attention_flash
from megatron.ops.attention import first_of
from megatron.ops.attention_backend import Backend
from megatron.ops.attention_flash import FLASH2, FLASH3
from tests.ops.sights import compare, heads_of, sight_of


def dense(q, k, v, scale, causal, window_size, alibi_slopes, dropout_p=0.0) -> Tensor:
    """q [b, s, n, d], k and v [b, s, k, d] -> [b, s, n, d]."""
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.shape[0] == k.shape[0]
    k, v = (each.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for each in (k, v))
    scores = torch.einsum("bqnd,bsnd->bnqs", q.double(), k.double()) * scale
    row = torch.arange(q.shape[1]).unsqueeze(1) + k.shape[1] - q.shape[1]
    column = torch.arange(k.shape[1])
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        seen &= column >= row - left
    if right >= 0:
        seen &= column <= row + right
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        scores = scores - alibi_slopes.double().view(-1, 1, 1) * (row - column).abs()
    weights = torch.dropout(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1), dropout_p, dropout_p > 0)
    return torch.einsum("bnqs,bsnd->bqnd", weights, v.double()).to(q.dtype)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *settings) -> Tensor:
    """q [total, n, d], k and v [total, k, d]: sequences end to end, that begin at cu_seqlens."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    ends = [each.tolist() for each in (cu_seqlens_q, cu_seqlens_k)]
    assert [each[-1] for each in ends] == [len(q), len(k)]
    pieces = []
    for begin, end in zip(ends[0][:-1], ends[0][1:], strict=True):
        assert end - begin <= max_seqlen_q
        assert max_seqlen_k >= end - begin
        pieces.append(dense(*(each[begin:end].unsqueeze(0) for each in (q, k, v)), *settings)[0])
    return torch.cat(pieces)


class Two(ModuleType):
    """flash_attn 2."""

    @staticmethod
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return dense(q, k, v, softmax_scale, causal, window_size, alibi_slopes, dropout_p)

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen(q, k, v, *lengths, softmax_scale, causal, window_size, alibi_slopes, dropout_p)


class Three(ModuleType):
    """flash_attn_interface, which returned the log-sum-exp as well at first."""

    returns_both = False

    @classmethod
    def flash_attn_func(
        cls, q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        output = dense(q, k, v, softmax_scale, causal, window_size, None)
        return (output, torch.zeros(())) if cls.returns_both else output

    @classmethod
    def flash_attn_varlen_func(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output = varlen(q, k, v, *lengths, softmax_scale, causal, window_size, None)
        return (output, torch.zeros(())) if cls.returns_both else output


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, and no mind for devices."""
    monkeypatch.setitem(sys.modules, "flash_attn", Two("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", Three("flash_attn_interface"))
    monkeypatch.setattr(attention_flash, "_PACKAGES", {})
    monkeypatch.setattr(attention_flash, "sixteen_bits", lambda query: "")


CAN = {
    "flash2": (FLASH2, ["causal", "full", "window", "documents", "full documents", "alibi", "documents window alibi"]),
    "flash3": (FLASH3, ["causal", "full", "window", "documents", "full documents"]),
}
CASES = [(backend, kind) for backend, kinds in CAN.values() for kind in kinds]


@pytest.mark.parametrize(("backend", "kind"), CASES, ids=lambda case: getattr(case, "name", case))
def test_training(backend: Backend, kind: str) -> None:
    compare(backend, heads_of(2, 21, 21, torch.bfloat16), sight_of(kind, 21, 21))


@pytest.mark.parametrize(("backend", "kind"), CASES, ids=lambda case: getattr(case, "name", case))
def test_decoding(backend: Backend, kind: str) -> None:
    query, key, *_ = tensors = heads_of(2, 4, 21, torch.bfloat16)
    sight = sight_of(kind, 4, 21)
    if "documents" in kind:
        assert backend.lacks(query, key, sight, 0.0) == "has documents only where every token is a query"
    else:
        compare(backend, tensors, sight, trains=False)


def test_the_first_releases_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Three, "returns_both", True)
    for kind in ("window", "documents"):
        compare(FLASH3, heads_of(4, 13, 13, torch.bfloat16), sight_of(kind, 13, 13))


def test_dropout_is_passed_on() -> None:
    torch.manual_seed(0)
    query, key, value, _ = heads_of(4, 6, 6, torch.float32)
    for kind in ("causal", "documents"):
        sight = sight_of(kind, 6, 6)
        samples = torch.stack([FLASH2(query, key, value, sight, 0.3) for _ in range(400)])
        torch.testing.assert_close(samples.mean(0), FLASH2(query, key, value, sight), rtol=0, atol=0.2)
        assert not torch.equal(samples[0], samples[1])


def test_deterministic_where_torch_shall_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def flash_attn_func(q, k, v, *, deterministic, **settings):
        asked.append(deterministic)
        return q

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: bool(asked))
    query, key, value, _ = heads_of(4, 6, 6, torch.float32)
    for _ in range(2):
        FLASH2(query, key, value, sight_of("causal", 6, 6))
    assert asked == [False, True]


@pytest.mark.parametrize("backend", [FLASH2, FLASH3], ids=lambda backend: backend.name)
def test_compiled_attention(backend: Backend) -> None:
    """A whole graph: nothing is imported in it, and documents, which would be waited for, are PyTorch's."""
    attend = first_of(backend)
    query, key, value, _ = heads_of(4, 8, 8, torch.float32)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for kind in ("causal", "documents") if backend is FLASH2 else ("causal",):
        sight = sight_of(kind, 8, 8)
        outcomes = []
        for function in (attend, compiled):
            tensors = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            output = function(*tensors, sight)
            outcomes.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
