"""Decoding: prompts in, samples out, in batches, with keys and values of earlier tokens kept.

samples = generate(model, tokenizer, ["def main():"], DecodingSettings(maximum_tokens=64, context=2048))
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron import logs
from megatron.config.schema.model import ModelConfig
from megatron.generation.sampling import Draws, SamplingSettings, choose
from megatron.model.cache import KVCache
from megatron.model.sequential import SequentialModel
from megatron.tokenizer.base import Tokenizer

logger = logs.get_logger(__name__)

_PREFILL = 512  # tokens of a prompt fed at once, which bounds the logits that are computed only to be dropped

SHOWN_WARNINGS = 3


@dataclass(frozen=True)
class DecodingSettings:
    """model: the shape of the model, whose `seq_length` bounds prompt and sample together.
    maximum_tokens: most new tokens of a sample. batch: prompts decoded together.
    recompute: no cache; the whole context is computed for every token.
    seed: of the draws.
    """

    model: ModelConfig
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    maximum_tokens: int = 64
    batch: int = 8
    recompute: bool = False
    seed: int = 1234


@dataclass(frozen=True)
class Sample:
    """What one prompt gave.

    tokens: the new ids, without the end-of-document id. finished: whether the model ended the document itself.
    message: what a reader should know (a prompt that was cut), or None.
    duration_seconds: wall time of the batch that the prompt was part of.
    """

    context: str
    text: str
    tokens: list[int]
    finished: bool
    message: str | None
    duration_seconds: float


@dataclass(frozen=True)
class _Prompt:
    """A prompt as ids. name: what its draws are seeded with; room: most new tokens."""

    index: int
    text: str
    name: str
    ids: list[int]
    room: int
    message: str | None


def generate(
    model: SequentialModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: DecodingSettings
) -> list[Sample]:
    """Return one sample for each prompt, in order; an empty prompt starts a document."""
    prepared = _prepare(prompts, tokenizer, settings)
    samples: dict[int, Sample] = {}
    for group in _groups(prepared, 1 if settings.recompute else settings.batch):
        started = time.perf_counter()
        ids = _decode(model, tokenizer, group, settings)
        seconds = round(time.perf_counter() - started, 3)
        for prompt, new in zip(group, ids, strict=True):
            samples[prompt.index] = _sample(tokenizer, prompt, new, seconds)
    return [samples[index] for index in range(len(prompts))]


def _prepare(prompts: Iterable[str], tokenizer: Tokenizer, settings: DecodingSettings) -> list[_Prompt]:
    """Return the prompts as ids that leave room for new tokens; long ones lose their beginning."""
    limit, wanted = settings.model.seq_length, settings.maximum_tokens
    longest = max(limit - wanted, limit // 2, 1)  # half of the context is the prompt's, whatever maximum_tokens says
    seen: dict[str, int] = {}
    prepared = []
    for index, text in enumerate(prompts):
        ids = tokenizer.encode(text) or [tokenizer.eod]
        messages = []
        if len(ids) > longest:
            messages.append(f"the first {len(ids) - longest} of the prompt's {len(ids)} tokens were left out")
            ids = ids[-longest:]
        room = min(wanted, limit - len(ids))
        if room < wanted:
            messages.append(f"at most {room} of maximum_tokens = {wanted} follow")
        message = f"{', and '.join(messages)}: seq_length is {limit}" if messages else None
        number = seen[text] = seen.get(text, -1) + 1
        prepared.append(_Prompt(index, text, f"{number}/{text}", ids, room, message))
    _warn([prompt for prompt in prepared if prompt.message])
    return prepared


def _warn(limited: Sequence[_Prompt]) -> None:
    """Say what seq_length took from the prompts, in a few lines however many there are; each sample says it too."""
    for prompt in limited[:SHOWN_WARNINGS]:
        logger.warning("prompt %d: %s", prompt.index, prompt.message)
    if len(limited) > SHOWN_WARNINGS:
        logger.warning("and so for %d more prompts; `message` of each sample says it", len(limited) - SHOWN_WARNINGS)


def _groups(prompts: Sequence[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    """Yield groups of at most `size` prompts with equal room and similar lengths, to pad little."""
    ordered = sorted(prompts, key=lambda prompt: (prompt.room, len(prompt.ids)))
    for _, alike in itertools.groupby(ordered, key=lambda prompt: prompt.room):
        yield from _batched(alike, size)


def _batched(items: Iterable[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    """Yield lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


@torch.no_grad()  # not inference mode: tables that the model keeps must serve training too
def _decode(
    model: SequentialModel, tokenizer: Tokenizer, group: Sequence[_Prompt], settings: DecodingSettings
) -> list[list[int]]:
    """Return the new ids of each prompt, the end-of-document id included where it came."""
    stepper = _Recomputing(model, group) if settings.recompute else _Cached(model, group, settings.model)
    draws = Draws(settings.seed, [prompt.name for prompt in group])
    new: list[list[int]] = [[] for _ in group]
    running = set(range(len(group)))
    tokens: Tensor | None = None
    for _ in range(group[0].room):
        logits = stepper.next(tokens)
        logits[:, tokenizer.vocab_size :] = float("-inf")  # rows that only pad the vocabulary have no text
        tokens = choose(logits, settings.sampling, draws)
        for row, token in enumerate(tokens.tolist()):
            if row in running:
                new[row].append(token)
                if token == tokenizer.eod:
                    running.discard(row)
        if not running:
            break
    return new


class _Cached:
    """Logits of the next token, with the keys and values of all earlier ones kept."""

    def __init__(self, model: SequentialModel, group: Sequence[_Prompt], shape: ModelConfig) -> None:
        parameter = next(model.parameters())
        width = max(len(prompt.ids) for prompt in group)
        padding = [width - len(prompt.ids) for prompt in group]
        rows = [[0] * pad + prompt.ids for pad, prompt in zip(padding, group, strict=True)]
        self.model = model
        self.device = parameter.device
        self.prompt = torch.tensor(rows, device=self.device)
        room, dtype = width + group[0].room, parameter.dtype
        self.cache = KVCache(shape, len(group), room, self.device, dtype, model.tensor_size)
        self.cache.set_padding(torch.tensor(padding))

    def next(self, tokens: Tensor | None) -> Tensor:
        """Return logits [b, v] after `tokens` [b], or after the prompts where it is None."""
        if tokens is not None:
            return self._last(tokens.unsqueeze(1))
        *head, tail = self.prompt.split(_PREFILL, dim=1)
        for part in head:
            self.model(part, cache=self.cache)
        return self._last(tail)

    def _last(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, cache=self.cache)
        return logits[:, -1].clone()


class _Recomputing:
    """The slow twin of _Cached, for one prompt: every token computes the whole context."""

    def __init__(self, model: SequentialModel, group: Sequence[_Prompt]) -> None:
        (prompt,) = group
        self.model = model
        self.context = torch.tensor([prompt.ids], device=next(model.parameters()).device)

    def next(self, tokens: Tensor | None) -> Tensor:
        """Return logits [1, v] after `tokens` [1], or after the prompt where it is None."""
        if tokens is not None:
            self.context = torch.cat([self.context, tokens.unsqueeze(1)], dim=1)
        logits: Tensor = self.model(self.context)
        return logits[:, -1].clone()


def _sample(tokenizer: Tokenizer, prompt: _Prompt, new: list[int], seconds: float) -> Sample:
    finished = bool(new) and new[-1] == tokenizer.eod
    tokens = new[:-1] if finished else new
    return Sample(prompt.text, tokenizer.decode(tokens), tokens, finished, prompt.message, seconds)
