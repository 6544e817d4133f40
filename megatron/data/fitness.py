"""Whether a token file fits the tokenizer of the run: the same tokenizer, and no id beyond its vocabulary.

`tools/preprocess_data.py` leaves a sidecar `<prefix>.json` that says which tokenizer made the file. Without one, tokens
are looked at: blocks spread over the file now, and every batch when it is read.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from megatron import logs
from megatron.data.documents import CHUNK_TOKENS
from megatron.data.gpt import beyond_vocabulary
from megatron.data.indexed import IndexedDataset
from megatron.data.sidecar import sidecar_path
from megatron.errors import DataError, Problem

SAMPLED_BLOCKS = 64
BLOCK_TOKENS = 1 << 14
logger = logs.get_logger(__name__)


def check_fitness(dataset: IndexedDataset, vocab_size: int | None, tokenizer_fingerprint: str | None) -> None:
    """Raise DataError where `dataset` was made by another tokenizer or has a token id from `vocab_size` on.

    vocab_size: entries of the tokenizer, without padding; None skips this check. tokenizer_fingerprint: its sha256;
    None skips that check.
    """
    sidecar = read_sidecar(dataset)
    made_by = sidecar.get("tokenizer_sha256")
    if tokenizer_fingerprint is not None and made_by is not None and made_by != tokenizer_fingerprint:
        raise _other_tokenizer(dataset.prefix, sidecar, tokenizer_fingerprint)
    if vocab_size is not None:
        largest = largest_sampled_token(dataset)
        if largest >= vocab_size:
            raise beyond_vocabulary(dataset.prefix, largest, vocab_size)


def read_sidecar(dataset: IndexedDataset) -> dict[str, Any]:
    """Return what `<prefix>.json` says; nothing where it is absent or, with a warning, no good."""
    path = sidecar_path(dataset.prefix)
    try:
        sidecar = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        sidecar = error
    if not isinstance(sidecar, dict):
        logger.warning("%s cannot be read as what tools/preprocess_data.py writes: nothing in it is checked.", path)
        return {}
    tokens = sidecar.get("tokens", dataset.num_tokens)
    if tokens != dataset.num_tokens:
        logger.warning(
            "%s counts %s tokens, %s.idx %s: it is not used.", path, tokens, dataset.prefix, dataset.num_tokens
        )
        return {}
    return sidecar


def largest_sampled_token(dataset: IndexedDataset) -> int:
    """The largest id within blocks spread evenly over the file, its end included; -1 for an empty file."""
    tokens = dataset.tokens
    if not tokens.size:
        return -1
    last = max(0, tokens.size - BLOCK_TOKENS)
    starts = np.unique(np.linspace(0, last, SAMPLED_BLOCKS, dtype=np.int64)).tolist()
    return max(int(tokens[start : start + BLOCK_TOKENS].max()) for start in starts)


def check_targets(labels: IndexedDataset) -> None:
    """Raise DataError where every label is negative, so that there would be nothing to learn. Reads until the first."""
    tokens = labels.tokens
    if not any(
        bool((tokens[begin : begin + CHUNK_TOKENS] >= 0).any()) for begin in range(0, tokens.size, CHUNK_TOKENS)
    ):
        why = "every label is negative, which means that no token is trained on."
        raise DataError(
            Problem(f"labels {labels.prefix}", why, "Keep the token ids of what is to be learnt as labels.")
        )


def _other_tokenizer(prefix: str, sidecar: dict[str, Any], fingerprint: str) -> DataError:
    made_by = sidecar["tokenizer_sha256"]
    named = f"{sidecar.get('tokenizer_type', 'a tokenizer')} {sidecar.get('vocab_file') or ''}".strip()
    return DataError(
        Problem(
            what=f"tokenizer of {prefix}",
            why=f"the data was built with {named} (sha256 {made_by[:12]}), but the configured tokenizer is another "
            f"(sha256 {fingerprint[:12]}); its ids mean other text.",
            fix="Set tokenizer_type and vocab_file to that tokenizer, or build the data again with "
            "tools/preprocess_data.py.",
        )
    )
