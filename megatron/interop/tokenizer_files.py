"""The tokenizer of an exported model, in the form of transformers' PreTrainedTokenizerFast."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from megatron.errors import ExportError, Problem
from megatron.interop.hf_files import write_json
from megatron.interop.verify import PROMPTS
from megatron.tokenizer.backend import BackendTokenizer
from megatron.tokenizer.base import Tokenizer

_TEXTS = (*PROMPTS, "  two  spaces\tand\nlines\n", "naïve café, 東京 🙂", "<|endoftext|>")


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> bool:
    """Write tokenizer.json and its config, and check that transformers gives the same ids.

    context: tokens, the model_max_length. Returns False, having written nothing, for kinds that are no tokenizer.json.
    Raises ExportError where transformers encodes a text to other ids.
    """
    if not isinstance(tokenizer, BackendTokenizer):
        return False
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    end, pad = (tokenizer.backend.id_to_token(token) for token in (tokenizer.eod, tokenizer.pad))
    special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _TEXTS:
        theirs = loaded(text)["input_ids"]
        if theirs != tokenizer.encode(text):
            why = f"transformers encodes {text!r} to {theirs[:8]}, and training used {tokenizer.encode(text)[:8]}."
            raise ExportError(Problem(f"tokenizer {tokenizer.name}", why, "Please report this with the tokenizer."))
    return True
