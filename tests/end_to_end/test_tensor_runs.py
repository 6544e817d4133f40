"""A whole run that is stopped and continued at other tensor parallel sizes is the run of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.layouts import assert_the_same_run
from tests.end_to_end.test_resume import run
from tests.end_to_end.tiny import tensors, write_corpus
from tests.ranks import run_ranks

# 512 ids make 540 rows in one process; a new model would have 720 on two tensor parallel ranks.
MODEL = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "gpt_j_residual": True, "make_vocab_size_divisible_by": 180}
TENSOR = {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}
SEQUENCE = {"model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 0}}


def test_a_run_that_changes_its_layout_is_the_run_that_does_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        write_corpus(folder / "corpus")
    halved = {"gradient_accumulation_steps": 1}
    layouts: list[tuple[int, int, dict[str, Any]]] = [
        (1, 2, {}),
        (2, 3, SEQUENCE),
        (4, 5, {**TENSOR, **halved, "zero_optimization": {"stage": 3}}),
        (4, 6, {**TENSOR, "pipe_parallel_size": 2, "sequence_parallel": True}),
        (2, 8, TENSOR),
    ]
    assert_the_same_run(whole, broken, MODEL, layouts)
    assert tensors(broken)["weight", "embedding.word_embeddings.weight"].shape[0] == 540


def test_a_vocabulary_that_the_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    run_ranks(1, lambda: run(tmp_path, exit_interval=2, **{**MODEL, "make_vocab_size_divisible_by": 171}))
    with pytest.raises(Exception, match="vocabulary of 513 rows cannot be divided by it"):
        run_ranks(2, lambda: run(tmp_path, 2, **{**MODEL, **TENSOR, "make_vocab_size_divisible_by": 171}))
