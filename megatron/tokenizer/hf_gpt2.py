"""HFGPT2Tokenizer: a model folder or a name on the Hugging Face hub, `gpt2` if none is given.

As in GPT-NeoX, `<|padding|>` is added to the vocabulary (50,258 entries for GPT-2), and the model's own eos_token ends
documents. A folder needs no network; a name is taken from the local cache or downloaded.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from megatron.tokenizer.backend import BackendTokenizer
from megatron.tokenizer.files import tokenizer_error
from megatron.tokenizer.gpt2_bpe import byte_level_bpe
from megatron.tokenizer.hf import load_backend, named_special_tokens
from megatron.tokenizer.special import END_OF_DOCUMENT, PADDING

KIND = "HFGPT2Tokenizer"


def load_hf_gpt2(vocab_file: str | None, merge_file: str | None = None) -> BackendTokenizer:
    """The tokenizer of the folder or hub name `vocab_file` (None: `gpt2`)."""
    name = vocab_file or "gpt2"
    folder = Path(name)
    backend = _from_folder(folder) if folder.is_dir() else _from_hub(name)
    named = named_special_tokens(folder)
    end = named.get("eos_token", END_OF_DOCUMENT)
    pad = named.get("pad_token", PADDING)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (end, pad)])
    return BackendTokenizer(KIND, name, backend, end, pad)


def _from_folder(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_backend(folder / "tokenizer.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return byte_level_bpe(vocab, merges)
    raise tokenizer_error(
        f"vocab_file = {folder}",
        "holds neither a tokenizer.json nor a vocab.json with its merges.txt.",
        "Name a folder that transformers' save_pretrained wrote.",
    )


def _from_hub(name: str) -> tokenizers.Tokenizer:
    if Path(name).suffix or name.count("/") > 1 or Path(name).exists():
        raise tokenizer_error(
            f"vocab_file = {name}",
            f"is not a folder, and {KIND} takes a model folder or a name on the hub.",
            "For one tokenizer.json, set tokenizer_type to HFTokenizer.",
        )
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception, and huggingface_hub a family of its own
        reason = str(error).strip().splitlines()
        raise tokenizer_error(
            f"vocab_file = {name}",
            f"is no local folder, and the hub did not give it ({reason[0] if reason else type(error).__name__}).",
            "Without network, copy the model's tokenizer.json here and use tokenizer_type HFTokenizer.",
        ) from error
