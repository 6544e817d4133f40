"""Small tokenizer files of every kind, made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import sentencepiece

from megatron.tokenizer.train import train_byte_level_bpe

SPECIAL = ("<|endoftext|>", "<|padding|>")
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
TEXTS += ["Fürchte dich nicht, Straße — naïve café. 日本語 текст 😀 <|endoftext|>\n"] * 3


def write_bpe(folder: Path) -> Path:
    """A tokenizer.json of 900 entries."""
    path = folder / "tokenizer.json"
    train_byte_level_bpe(TEXTS, 900).save(str(path))
    return path


def write_gpt2(folder: Path, bpe_file: Path) -> tuple[Path, Path]:
    """The vocab.json and merges.txt of `bpe_file` in GPT-2's form: bytes first, `<|endoftext|>` last."""
    model = json.loads(bpe_file.read_text(encoding="utf-8"))["model"]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in SPECIAL]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|endoftext|>"])}
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def write_sentencepiece(folder: Path) -> Path:
    """A sentencepiece BPE model of 600 pieces with byte fallback."""
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=600, model_type="bpe", byte_fallback=True,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder / "spm.model"


def write_ranks(folder: Path) -> Path:
    """A tiktoken file of ranks: the bytes, then a few merges of them."""
    pieces = [bytes([value]) for value in range(256)]
    pieces += [b"th", b"he", b"the", b" t", b" the", b"in", b"12", b"123", b"  ", b"    ", b"\n\n", "é".encode()]
    path = folder / "cl100k_base.tiktoken"
    path.write_bytes(b"".join(b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    return path
