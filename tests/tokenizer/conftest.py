"""The small tokenizer files, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizer import small


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def bpe_file(folder: Path) -> Path:
    return small.write_bpe(folder)


@pytest.fixture(scope="session")
def gpt2_files(folder: Path, bpe_file: Path) -> tuple[Path, Path]:
    return small.write_gpt2(folder / "gpt2", bpe_file)


@pytest.fixture(scope="session")
def spm_file(folder: Path) -> Path:
    return small.write_sentencepiece(folder)


@pytest.fixture(scope="session")
def rank_file(folder: Path) -> Path:
    return small.write_ranks(folder)
