"""Where tokens come from."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section


class DataConfig(Section):
    data_path: str | None = None
    split: str = "969, 30, 1"
    train_data_paths: list[str] | None = None
    valid_data_paths: list[str] | None = None
    test_data_paths: list[str] | None = None
    train_label_data_paths: list[str] | None = None
    valid_label_data_paths: list[str] | None = None
    test_label_data_paths: list[str] | None = None
    train_data_weights: list[float] | None = None
    valid_data_weights: list[float] | None = None
    test_data_weights: list[float] | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0
    data_impl: Literal["infer", "mmap"] = "infer"
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    allow_chopped: bool = True
    mmap_warmup: bool = False
    num_workers: int = 2


class TokenizerConfig(Section):
    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"
    ] = "GPT2BPETokenizer"
    vocab_file: str | None = None
    merge_file: str | None = None
