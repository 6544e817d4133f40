"""Every back end of attention equals softmax(scale q k^T + bias) v, gradients included, or says what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from megatron.model.positions import AttentionMask, Span
from megatron.ops import attention_cpu
from megatron.ops.attention import attention, attention_reference, first_of, sight_reference
from megatron.ops.attention_backend import Backend, UnservedError
from megatron.ops.attention_dense import DENSE
from megatron.ops.attention_flash import FLASH2, FLASH3
from megatron.ops.attention_sdpa import CUDNN, EFFICIENT, FLASH, SDPA
from megatron.ops.sight import Sight
from tests.ops.sights import KINDS, TOLERANCES, compare, heads_of, sight_of

HERE = {"sdpa": SDPA, "dense": DENSE}
OF_PYTORCH = {"cudnn": CUDNN, "flash": FLASH, "efficient": EFFICIENT}
PACKAGES = {"flash_attn": FLASH2, "flash_attn_interface": FLASH3}
ON_GPU = HERE | OF_PYTORCH | {each.name: each for name, each in PACKAGES.items() if find_spec(name) is not None}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_heads", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_training(name: str, kind: str, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", 16)
    compare(HERE[name], heads_of(kv_heads, 37, 37, dtype), sight_of(kind, 37, 37))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 5, 21])
def test_evaluation_and_decoding(name: str, kind: str, queries: int) -> None:
    """Of 21 tokens all are queries, the last ones, or the last one."""
    with torch.no_grad():
        compare(HERE[name], heads_of(2, queries, 21, torch.float32), sight_of(kind, queries, 21), trains=False)


@pytest.mark.parametrize("kept", [16, 512])
@pytest.mark.parametrize("kind", ["causal", "window", "documents window alibi", "padding"])
@pytest.mark.parametrize("queries", [40, 19])
def test_blocks_on_a_cpu(kind: str, queries: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", 16)
    monkeypatch.setattr(attention_cpu, "LONGEST_KEPT", kept)
    blocks = list(attention_cpu.blocks_of(sight_of(kind, queries, 40), queries, 40))
    assert len(blocks) == -(-queries // 16)
    compare(SDPA, heads_of(2, queries, 40, torch.float32), sight_of(kind, queries, 40))


@pytest.mark.parametrize(("kind", "first"), [("window", 31), ("documents", 32), ("causal", 0)])
def test_blocks_leave_out_what_no_query_sees(kind: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", 8)
    sight = replace(sight_of(kind, 48, 48), segments=torch.arange(48)[None] // 16 if kind == "documents" else None)
    blocks = list(attention_cpu.blocks_of(sight, 48, 48))
    assert blocks[-1].keys.start == first
    assert [block.keys.stop for block in blocks] == list(range(8, 49, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 300])
def test_training_on_a_cpu_equals_torchs_kernel(dtype: torch.dtype, length: int) -> None:
    query, key, value, _ = heads_of(2, length, length, dtype)
    with torch.no_grad():
        expected = attention(query, key, value, Sight(0.3))
    trained = attention(query.detach().requires_grad_(), key, value, Sight(0.3))
    torch.testing.assert_close(trained, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("name", HERE)
def test_a_learned_bias_has_a_gradient(name: str) -> None:
    tensors = heads_of(4, 6, 6, torch.float32)[:3]
    gradients = []
    for function in (HERE[name], sight_reference):
        bias = torch.linspace(-1, 1, 4 * 36).view(4, 6, 6).requires_grad_()
        function(*tensors, Sight(0.3, bias=bias)).square().sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_dropout_keeps_the_mean(name: str, kind: str) -> None:
    torch.manual_seed(0)
    query, key, value, _ = heads_of(4, 6, 6, torch.float32)
    sight = sight_of(kind, 6, 6)
    samples = torch.stack([HERE[name](query, key, value, sight, 0.3) for _ in range(600)])
    torch.testing.assert_close(samples.mean(0), HERE[name](query, key, value, sight), rtol=0, atol=0.2)
    assert not torch.equal(samples[0], samples[1])


def test_the_two_formulae_agree() -> None:
    query, key, value, _ = heads_of(2, 7, 7, torch.float32)
    torch.testing.assert_close(
        sight_reference(query, key, value, Sight(0.3)), attention_reference(query, key, value, 0.3, causal=True)
    )


SAYS = [
    (CUDNN, "window", "has no local windows"),
    (FLASH, "alibi", "has no alibi"),
    (FLASH, "padding", "has no left padding"),
    (FLASH2, "bias", "has no learned biases"),
    (FLASH3, "alibi", "has no alibi"),
    (FLASH2, "padding", "has no left padding"),
]


@pytest.mark.parametrize(("backend", "kind", "sentence"), SAYS)
def test_a_back_end_says_what_it_cannot_do(backend: Backend, kind: str, sentence: str) -> None:
    meta = [each.to("meta") for each in heads_of(2, 9, 9, torch.bfloat16)[:3]]
    with pytest.raises(UnservedError, match=f"{backend.name} {sentence}"):
        backend(*meta, sight_of(kind, 9, 9))


def test_what_kernels_of_sixteen_bits_take() -> None:
    query, key, _, _ = heads_of(4, 9, 9, torch.bfloat16)
    assert FLASH3.lacks(query, key, Sight(1.0), 0.0) == "needs a CUDA device, and this is cpu"
    assert EFFICIENT.lacks(query, key, Sight(1.0), 0.0) == "needs a CUDA device, and this is cpu"
    meta, odd = query.to("meta"), torch.empty(2, 4, 9, 12, dtype=torch.bfloat16, device="meta")
    assert FLASH2.lacks(meta.float(), key, Sight(1.0), 0.0) == "takes fp16 and bf16, and not float32"
    assert "multiple of 8 up to 256 features, and not 12" in FLASH2.lacks(odd, odd, Sight(1.0), 0.0)
    assert FLASH3.lacks(meta, key, Sight(1.0), 0.1) == "has no dropout"
    assert FLASH2.lacks(meta, key, Sight(1.0), 0.1) == ""
    both_ways = Sight(1.0, slopes=torch.ones(4), causal=False)
    assert "without their sign" in FLASH2.lacks(meta, key, both_ways, 0.0)
    assert "and not with the last" in CUDNN.lacks(meta[:, :, :3], key, Sight(1.0), 0.0)
    assert CUDNN.lacks(meta, key, Sight(1.0, window=8), 0.0) == ""  # which hides nothing of 9 tokens


def test_what_the_first_cannot_the_next_does() -> None:
    asked: list[str] = []

    def named(name: str, reason: str) -> Backend:
        def compute(query, key, value, sight, dropout):
            asked.append(name)
            return query

        return Backend(name, compute, lambda query, key, sight, dropout: reason if sight.window else "")

    query, key, value, _ = heads_of(4, 9, 9, torch.float32)
    attend = first_of(named("one", "has none"), named("two", ""))
    attend(query, key, value, Sight(1.0))
    attend(query, key, value, Sight(1.0, window=3))
    assert asked == ["one", "two"]
    torch.testing.assert_close(
        first_of(named("one", "has none"))(query, key, value, Sight(1.0, window=3)),
        attention(query, key, value, Sight(1.0, window=3)),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "trains"), [(200, True), (200, False), (7, False), (1, False)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_on_a_gpu(name: str, kind: str, queries: int, trains: bool, dim: int) -> None:
    # Rows of 16 bytes each, as those of a model are: flash-attn reads them so, and checks nothing.
    tensors = heads_of(2, queries, 200, torch.bfloat16, "cuda", dim, gap=8)
    sight = sight_of(kind, queries, 200, "cuda", 0.1)
    reason = ON_GPU[name].lacks(tensors[0], tensors[1], sight, 0.0)
    if reason:
        with pytest.raises(UnservedError, match=name):
            ON_GPU[name](*tensors[:3], sight)
        return
    compare(ON_GPU[name], tensors, sight, trains)


def test_rows_of_several_documents_go_to_the_back_end_that_was_chosen_for_them() -> None:
    asked: list[str] = []

    def named(name: str) -> Backend:
        return Backend(name, lambda q, k, v, sight, p: (asked.append(name), SDPA(q, k, v, sight, p))[1], lambda *_: "")

    attend, values = first_of(named("plain"), named("documents")), [torch.randn(1, 2, 4, 8) for _ in range(3)]
    attend(*values, Sight(0.3))
    attend(*values, Sight(0.3, segments=torch.tensor([[0, 0, 1, 1]])))
    assert asked == ["plain", "documents"]


def test_large_fp16_scores_do_not_overflow_before_they_are_scaled() -> None:
    query, key, value = (35 * torch.randn(1, 1, 6, 128) for _ in range(3))
    key = query.clone()
    sight = Sight(128**-0.5)
    found = DENSE(query.half(), key.half(), value.half(), sight)
    expected = sight_reference(query.half().float(), key.half().float(), value.half().float(), sight)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=0.5)


def test_what_a_sight_has_made_serves_layers_of_another_scale() -> None:
    mask, span = AttentionMask(window=2), Span(0, 5)
    first, second = (mask(scale, span, None, None, torch.device("cpu")) for scale in (0.5, 0.25))
    assert (first.scale, second.scale) == (0.5, 0.25)
    assert first.mask(5, 5, torch.device("cpu")) is second.mask(5, 5, torch.device("cpu"))
