"""Training a tokenizer: byte-level BPE, which can write every text and gives it back unchanged.

The one idea: the 256 bytes are always in the vocabulary, so nothing is unknown. GPT-NeoX's trainer also normalises the
text to NFKC and puts a space before it, which loses information (source code does not survive it); here both are
options.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; byte level as in GPT-2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.tokenizer.files import tokenizer_error
from megatron.tokenizer.special import END_OF_DOCUMENT, PADDING

NUM_BYTES = 256


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_DOCUMENT, PADDING),
    min_frequency: int = 2,
    nfkc: bool = False,
    prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """Return a tokenizer of at most `vocab_size` entries trained on `texts`.

    special_tokens: take the first ids, in this order. min_frequency: pairs seen less often are not merged. nfkc:
    normalise text to NFKC. prefix_space: put a space before every text.
    Raises TokenizerError where vocab_size has no room for the bytes and the special tokens.
    """
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        why = f"has no room for the {NUM_BYTES} bytes and {len(special_tokens)} special tokens."
        raise tokenizer_error(f"--vocab-size {vocab_size}", why, f"Use at least {least}; 32000 to 100000 are usual.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if nfkc:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
