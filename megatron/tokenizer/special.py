"""Which id ends a document and which one pads, for tokenizers that do not say so in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.tokenizer.files import tokenizer_error

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"

KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "[EOS]",
    "[SEP]",
)
"""Tried in this order: GPT-NeoX's own, then those of Llama-3, DeepSeek, Llama-2, Gemma and BERT."""

KNOWN_PADS = (PADDING, "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


def first_id(token_to_id: Callable[[str], int | None], candidates: Sequence[str | None]) -> int | None:
    """The id of the first candidate that the vocabulary has; None where it has none of them."""
    ids = (token_to_id(candidate) for candidate in candidates if candidate)
    return next((found for found in ids if found is not None), None)


def require_end(end: int | None, source: str) -> int:
    """The end-of-document id, or an error that says which tokens were looked for."""
    if end is None:
        raise tokenizer_error(
            source,
            f"has no end-of-document token: none of {', '.join(KNOWN_ENDS)} is in its vocabulary.",
            f"Add {END_OF_DOCUMENT} to it, or name its token as eos_token in a tokenizer_config.json beside the file.",
        )
    return end
