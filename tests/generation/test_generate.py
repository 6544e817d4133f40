"""Decoding with a cache is decoding of the whole context, token for token, in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.generation.generate import DecodingSettings, _prepare, generate
from megatron.generation.sampling import SamplingSettings
from megatron.tokenizer.build import build_tokenizer
from tests.generation.trained import make_config, make_model

PROMPTS = ["Hello", "a", "", "The quick brown fox", "Hello"]

SHAPES = {
    "rotary": {},
    "rotary25_parallel": {"rotary_pct": 0.25, "gpt_j_residual": True},
    "learned_tied": {"pos_emb": "learned", "no_weight_tying": False},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "alibi": {"pos_emb": "alibi"},
    "rpe": {"pos_emb": "rpe"},
    "none": {"pos_emb": "none"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False},
    "window": {"sliding_window_width": 4},
    "qk_norm": {"use_qk_layernorm": True},
}


def by_hand(model, config, tokenizer, prompt, number):
    """The simplest decoding there is: the whole context for every token, the likeliest token."""
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    new = []
    for _ in range(number):
        token = model(torch.tensor([ids + new]))[0, -1, : tokenizer.vocab_size].argmax().item()
        new.append(token)
        if token == tokenizer.eod:
            return new[:-1]
    return new


@pytest.mark.parametrize("name", SHAPES)
def test_cached_batches_equal_full_context_decoding(name):
    config = make_config(**SHAPES[name])
    model, tokenizer = make_model(config), build_tokenizer(config.tokenizer)
    settings = DecodingSettings(config.model, maximum_tokens=12, batch=3)
    samples = generate(model, tokenizer, PROMPTS, settings)
    alone = [generate(model, tokenizer, [prompt], settings)[0] for prompt in PROMPTS]
    again = generate(model, tokenizer, PROMPTS, replace(settings, recompute=True))
    for prompt, sample, single, recomputed in zip(PROMPTS, samples, alone, again, strict=True):
        expected = by_hand(model, config, tokenizer, prompt, 12)
        assert sample.tokens == single.tokens == recomputed.tokens == expected
        assert sample.context == prompt


def test_long_prompts_are_fed_in_parts(monkeypatch):
    monkeypatch.setattr("megatron.generation.generate._PREFILL", 4)
    config = make_config()
    model, tokenizer = make_model(config), build_tokenizer(config.tokenizer)
    (sample,) = generate(model, tokenizer, ["a longer prompt"], DecodingSettings(config.model, maximum_tokens=9))
    assert sample.tokens == by_hand(model, config, tokenizer, "a longer prompt", 9)


def sampled(prompts, **changes):
    config = make_config()
    settings = DecodingSettings(config.model, SamplingSettings(1.0, 40, 0.9), 10)
    samples = generate(make_model(config), build_tokenizer(config.tokenizer), prompts, replace(settings, **changes))
    return [sample.tokens for sample in samples]


def test_samples_depend_on_prompt_and_seed_not_on_order_or_batch():
    first = sampled(PROMPTS)
    assert sampled(PROMPTS) == first
    assert sampled(PROMPTS[3::-1]) == first[3::-1]
    assert sampled(PROMPTS, batch=1) == first
    assert sampled(PROMPTS, recompute=True) == first
    assert sampled(PROMPTS, seed=1) != first
    assert first[0] != first[4], "the same prompt twice gives two samples"


class EndsAfter:
    """Stands for a model that wants the document to end once `number` tokens are there."""

    tensor_size = 1

    def __init__(self, model, eod, number):
        self.model, self.eod, self.number = model, eod, number

    def parameters(self):
        return self.model.parameters()

    def __call__(self, tokens, cache=None):
        logits = self.model(tokens, cache=cache)
        length = cache.length if cache else tokens.shape[1]
        if length >= self.number:
            logits[:, :, self.eod] = 1e6
        return logits


def test_the_end_of_the_document_ends_the_sample():
    config = make_config()
    tokenizer = build_tokenizer(config.tokenizer)
    model = EndsAfter(make_model(config), tokenizer.eod, 8)
    done, cut = (
        generate(model, tokenizer, ["Hello"], DecodingSettings(config.model, maximum_tokens=number))[0]
        for number in (20, 3)
    )
    assert done.finished
    assert len(done.tokens) == 3
    assert tokenizer.eod not in done.tokens
    assert not cut.finished
    assert cut.tokens == done.tokens


def test_padding_rows_of_the_vocabulary_are_never_sampled():
    config = make_config()
    model, tokenizer = make_model(config), build_tokenizer(config.tokenizer)
    model.head.weight[300:] *= 100

    class Small:
        vocab_size, eod = 300, 299
        encode, decode = staticmethod(tokenizer.encode), staticmethod(tokenizer.decode)

    for sampling in (SamplingSettings(), SamplingSettings(2.0)):
        (sample,) = generate(model, Small(), ["Hello"], DecodingSettings(config.model, sampling, 20))
        assert max(sample.tokens) < 300


def lengths(prompts, **changes):
    config = make_config(pos_emb="learned")
    model, tokenizer = make_model(config), build_tokenizer(config.tokenizer)
    return generate(model, tokenizer, prompts, DecodingSettings(config.model, **changes))


ALPHABET = "".join(chr(97 + number % 26) for number in range(100))


def test_long_prompts_lose_their_beginning_and_say_so():
    sample, same = lengths([ALPHABET, ALPHABET[-38:]], maximum_tokens=10)
    assert sample.tokens == same.tokens
    assert same.message is None
    assert sample.message == "the first 62 of the prompt's 100 tokens were left out: seq_length is 48"


def test_half_of_the_context_is_the_prompts():
    short, long = lengths(["abc", ALPHABET], maximum_tokens=500)
    assert len(short.tokens) <= 45
    assert short.message == "at most 45 of maximum_tokens = 500 follow: seq_length is 48"
    assert len(long.tokens) <= 24
    assert long.message == (
        "the first 76 of the prompt's 100 tokens were left out, and at most 24 of maximum_tokens = 500 follow: "
        "seq_length is 48"
    )


def test_warnings_about_prompts_stay_few(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    settings = DecodingSettings(model=config.model, maximum_tokens=100)
    _prepare([f"prompt {number}" for number in range(20)], build_tokenizer(config.tokenizer), settings)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "17 more prompts" in said[-1]
