"""The proof of a conversion: the same tokens through both models, and how far their logits are apart.

The proof is in fp32, where two right implementations differ by rounding only; the stored precision is measured
beside it, for information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron.errors import ExportError, Problem
from megatron.tokenizer.base import Tokenizer

PROMPTS = (
    "The capital of France is",
    "def factorial(n):\n    ",
    "In 1905, Albert Einstein published",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time there was a",
)
TOLERANCE = 1e-3
"""Largest accepted difference of fp32 logits, as a share of the largest logit (of 1 where all are smaller)."""

_LONGEST = 256  # tokens; far positions show errors of rotary embeddings that near ones hide
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Agreement:
    """How two models agree on the same tokens.

    largest_difference, largest_logit: over all positions and the whole vocabulary.
    top1: share of positions with the same likeliest token. losses: mean cross entropy in nats, ours and theirs.
    """

    precision: str
    largest_difference: float
    largest_logit: float
    top1: float
    losses: tuple[float, float]
    num_positions: int

    @property
    def accepted(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        ours, theirs = self.losses
        return (
            f"{self.precision}: largest difference of logits {self.largest_difference:.2e} (largest logit "
            f"{self.largest_logit:.1f}), same likeliest token {self.top1:.2%} of {self.num_positions} positions, "
            f"loss {ours:.4f} and {theirs:.4f} (difference {abs(ours - theirs):.1e})"
        )


def fixed_batches(rows: int, context: int, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Return token batches [b, s]: pseudo-random ids, one row as long as the context up to 256, and the prompts.

    rows: ids to draw from, [0, rows).
    """
    generator = torch.Generator().manual_seed(1234)
    length = min(context, _LONGEST)
    batches = [torch.randint(0, rows, shape, generator=generator) for shape in ((2, min(context, 32)), (1, length))]
    prompts = [tokenizer.encode(prompt)[:length] for prompt in PROMPTS] if tokenizer else []
    return [*batches, *(torch.tensor([ids]) for ids in prompts if ids)]


@torch.no_grad()
def our_logits(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of our model, fp32 [b, s, v] for each batch."""
    return [model(tokens).float() for tokens in batches]


@torch.no_grad()
def hf_logits(folder: Path, precision: str, batches: Sequence[Tensor]) -> list[Tensor]:
    """Load the folder with transformers and return its logits, fp32 [b, s, v] for each batch.

    Raises ExportError where transformers finds weights missing, left over, or of another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=_DTYPES[precision], output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise ExportError(Problem(str(folder), f"transformers reports {wrong}.", "This is a defect of the converter."))
    model.eval()
    return [model(tokens).logits.float() for tokens in batches]


def compare(precision: str, batches: Sequence[Tensor], ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Agreement:
    """Return how two lists of logits agree."""
    differences = [(left - right).abs().max() for left, right in zip(ours, theirs, strict=True)]
    same = [(left.argmax(-1) == right.argmax(-1)).flatten() for left, right in zip(ours, theirs, strict=True)]
    positions = torch.cat(same)
    return Agreement(
        precision=precision,
        largest_difference=torch.stack(differences).max().item(),
        largest_logit=max(logits.abs().max().item() for logits in theirs),
        top1=positions.double().mean().item(),
        losses=(_loss(batches, ours), _loss(batches, theirs)),
        num_positions=positions.numel(),
    )


def _loss(batches: Sequence[Tensor], logits: Sequence[Tensor]) -> float:
    """Return the mean cross entropy of the next token in nats."""
    losses = [
        F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        for tokens, scores in zip(batches, logits, strict=True)
    ]
    return torch.cat(losses).mean().item()


def require_agreement(agreement: Agreement, what: str) -> None:
    """Raise ExportError where the logits are further apart than the tolerance."""
    if agreement.accepted:
        return
    raise ExportError(
        Problem(
            what=what,
            why=f"It does not compute the same logits. {agreement}; accepted is {TOLERANCE:.0e} of the largest logit.",
            fix="Nothing was written. Please report this with the model's config.yml.",
        )
    )
