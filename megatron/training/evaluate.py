"""Validation: the mean loss over a window of a data set, the same window whenever the same iteration is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.data.loaders import BatchLoader
from megatron.engine.base import Engine
from megatron.parallel.mesh import Mesh
from megatron.tokenizer.base import Tokenizer
from megatron.training.stop import Agreement


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per trained token; nan where none of the window's labels is trained on. num_tokens: trained
    tokens read. character_perplexity: perplexity per character of the text, where char_level_ppl asks for it."""

    loss: float
    num_tokens: int
    character_perplexity: float | None = None


class Evaluator:
    """Evaluates one data set in windows of eval_iters global batches.

    The k-th regular evaluation reads the k-th window, as GPT-NeoX does, whether or not the run was resumed before it;
    the one at iteration 0 reads the same window as the first regular one.
    """

    def __init__(self, config: Config, mesh: Mesh, loader: BatchLoader, tokenizer: Tokenizer) -> None:
        self._training = config.training
        self._mesh = mesh
        self._loader = loader
        self._tokenizer = tokenizer

    def window(self, iteration: int) -> int:
        """Return the number of the window that is read after `iteration` optimizer steps."""
        return max(0, math.ceil(iteration / self._training.eval_interval) - 1)

    def evaluate(self, engine: Engine, window: int, stop: Agreement) -> Evaluation | None:
        """Return the mean over all data-parallel ranks of window number `window`; every rank must call it.

        None where the ranks agree between two batches to stop; `stop` hears of it with each batch."""
        size = self._training.eval_iters
        loss_sum, num_tokens, num_characters = 0.0, 0, 0
        for number, batches in enumerate(self._loader.window(window * size, size), start=1):
            found = engine.evaluate(batches, stop.wishes)
            loss_sum += found.loss_sum
            num_tokens += found.num_tokens
            if self._training.char_level_ppl:
                num_characters += self._count_characters(batches)
            stop.hear(found.wishes)
            if stop.reason is not None and number < size:
                return None
        loss = loss_sum / num_tokens if num_tokens else math.nan
        characters = self._sum(num_characters)
        by_character = math.exp(min(loss_sum / characters, 700.0)) if characters else None
        return Evaluation(loss, num_tokens, by_character)

    def _count_characters(self, batches: list[Batch]) -> int:
        """Return the length of the text of this rank's trained labels."""
        trained = [labels[mask > 0] for b in batches for labels, mask in zip(b.labels, b.loss_mask, strict=True)]
        return sum(len(self._tokenizer.decode(labels.tolist())) for labels in trained)

    def _sum(self, count: int) -> int:
        if self._mesh.dp.size == 1 or not self._training.char_level_ppl:
            return count
        total = torch.tensor(count, dtype=torch.int64, device=self._mesh.device)
        dist.all_reduce(total, group=self._mesh.dp.group)
        return int(total)
