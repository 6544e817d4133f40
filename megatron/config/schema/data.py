"""Where tokens come from."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section, setting


class DataConfig(Section):
    """Data sets as path prefixes of .bin and .idx files, and how samples are cut from them."""

    data_path: str | None = setting(
        None, "Prefix of one data set (without .bin), divided by `split`. Either this or train_data_paths."
    )
    split: str = setting(
        "969, 30, 1", "Shares of training, validation and test documents of data_path, divided by comma or slash."
    )
    train_data_paths: list[str] | None = setting(None, "Prefixes of the training data sets, blended.")
    valid_data_paths: list[str] | None = setting(None, "Prefixes of the validation data sets, blended.")
    test_data_paths: list[str] | None = setting(None, "Prefixes of the test data sets, blended.")
    train_label_data_paths: list[str] | None = setting(
        None, "One prefix of labels for each training prefix; a negative label has no loss."
    )
    valid_label_data_paths: list[str] | None = setting(None, "One prefix of labels for each validation prefix.")
    test_label_data_paths: list[str] | None = setting(None, "One prefix of labels for each test prefix.")
    train_data_weights: list[float] | None = setting(
        None, "Share of each training prefix in the blend; they need not sum to 1. Unset: equal."
    )
    valid_data_weights: list[float] | None = setting(None, "Share of each validation prefix. Unset: equal.")
    test_data_weights: list[float] | None = setting(None, "Share of each test prefix. Unset: equal.")
    weight_by_num_documents: bool = setting(
        False, "Derive the blend's weights from the document counts and weighted_sampler_alpha."
    )
    weighted_sampler_alpha: float = setting(
        1.0,
        "Exponent on document counts under weight_by_num_documents; less than 1 favours small sets.",
        unit="exponent",
        ge=0,
    )
    data_impl: Literal["infer", "mmap"] = setting("infer", "Format of the data files; both mean the mmap format.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = setting(
        "packed",
        "packed: samples are cut from one long stream; pack_until_overflow: whole documents while they fit; unpacked: "
        "one document per sample.",
    )
    allow_chopped: bool = setting(
        True, "Whether pack_until_overflow and unpacked may cut documents longer than seq_length, or skip them."
    )
    mmap_warmup: bool = setting(False, "Read the data files once at the start so that they are in the page cache.")
    num_workers: int = setting(
        2, "Threads that read batches ahead, per rank; 0 reads each step when it is asked for.", unit="threads", ge=0
    )
    data_index_dir: str | None = setting(
        None,
        "Folder for the sample indices of large data sets, readable by all ranks. Unset: index_cache beside the data.",
    )


class TokenizerConfig(Section):
    """The tokenizer that made the data; generation needs it too."""

    tokenizer_type: Literal[
        "GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer"
    ] = setting("GPT2BPETokenizer", "Kind of tokenizer.")
    vocab_file: str | None = setting(
        None, "Vocabulary or tokenizer file, or the encoding's name for TiktokenTokenizer and HFGPT2Tokenizer."
    )
    merge_file: str | None = setting(None, "Merges file of GPT2BPETokenizer.")
