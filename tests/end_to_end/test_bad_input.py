"""What a user can do wrong, through the front door: each is one error that says what, where, why and the fix."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.checkpoint import local_storage
from megatron.checkpoint.load import CheckpointReader
from megatron.data.indexed import IndexedWriter
from megatron.errors import CheckpointError, ConfigError, DataError, DeepyError
from megatron.parallel.mesh import Mesh
from megatron.training.run import train
from tests.end_to_end.tiny import config, write_corpus
from tests.ranks import run_ranks


def start(folder: Path, **changes: Any) -> None:
    """Train the tiny run for two steps in a process of its own."""
    run_ranks(1, lambda: train(config(folder, **{"train_iters": 2, **changes}), Mesh.create()).progress.as_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def truncate_bin(folder: Path) -> None:
    path = folder / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-100])


def write_legacy_index(folder: Path) -> None:
    (folder / "corpus.idx").write_bytes(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, 4, 4))


def remove_data(folder: Path) -> None:
    (folder / "corpus.bin").unlink()


def write_large_token(folder: Path) -> None:
    with IndexedWriter(folder / "corpus", np.int32) as writer:
        for _ in range(40):
            writer.add_document([70000, *range(200)])


def write_other_tokenizer(folder: Path) -> None:
    facts = {"tokenizer_type": "HFTokenizer", "tokenizer_sha256": "0" * 64, "vocab_size": 512}
    (folder / "corpus.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_data, r"corpus\.bin"),
        (truncate_bin, r"corpus\.bin.*truncated"),
        (write_legacy_index, r"corpus\.idx.*TNTIDX"),
        (write_large_token, r"70,?000"),
        (write_other_tokenizer, r"tokenizer"),
    ],
)
def test_data_that_cannot_be_trained_on(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        start(folder)
    assert all(problem.fix for problem in error.value.problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 2}, "num_layers"),
        ({"hidden_size": "wide"}, r"hidden_size = .*wide"),
        ({"num_attention_heads": 5}, r"num_attention_heads = 5"),
        ({"precision": "fp16", "engine": "deepspeed"}, r"fp16.*this machine's cpu.*precision: bf16"),
        ({"split": "0,50,50"}, r"split"),
        ({"split": "90,x"}, r"split"),
    ],
)
def test_settings_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeepyError, match=message) as error:
        start(folder, **changes)
    assert isinstance(error.value, ConfigError | DataError)
    assert all(problem.fix for problem in error.value.problems)


def test_checkpoint_of_another_model(folder: Path) -> None:
    start(folder)
    with pytest.raises(CheckpointError, match=r"num_layers = 3.*num_layers = 2"):
        start(folder, num_layers=3)


def flip(path: Path | None, place: int) -> None:
    """Flip a bit of a file."""
    assert path is not None
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "a tensor": lambda folder: flip(folder / "rank_00000.safetensors", -10),
    "the header": lambda folder: flip(folder / "rank_00000.safetensors", 60),
    "the manifest": lambda folder: flip(folder / "manifest.json", 400),
    "its end": lambda folder: os.truncate(folder / "rank_00000.safetensors", 5000),
    "a file": lambda folder: (folder / "rank_00000.safetensors").unlink(),
}
WHYS = {
    "a tensor": "The values of .* do not match their hash",
    "the header": "Its header does not match its hash",
    "the manifest": "Its content does not match its checksum|It is not JSON",
    "its end": "The file is truncated: 5000 bytes of",
    "a file": "The file is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_only_a_resume_takes_an_earlier_one(
    folder: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    start(folder, checkpoint_factor=1, eval_iters=0)
    newest = folder / "checkpoints" / "global_step2"
    DAMAGES[damage](newest)
    for named in ({"load": str(folder / "checkpoints"), "save": str(folder / "other")}, {"iteration": 2}):
        with pytest.raises(CheckpointError, match=rf"global_step2/(rank_00000|mani)(.|\n)*({WHYS[damage]})") as caught:
            start(folder, eval_iters=0, **named)
        assert f"{folder}/checkpoints/global_step1 is complete. Load it with load: {folder}/ch" in str(caught.value)
    capfd.readouterr()
    start(folder, eval_iters=0)
    said = capfd.readouterr().err
    assert f"THE NEWEST CHECKPOINT IS DAMAGED: {newest}/" in said
    assert f"takes an earlier one instead: {folder}/checkpoints/global_step1" in said
    assert "continuing after iteration 1" in said
    CheckpointReader(newest).verify()  # step 2 was trained again, and took the place of the damaged one


def test_a_checkpoint_from_the_future_is_not_passed_over(folder: Path) -> None:
    start(folder, checkpoint_factor=1, eval_iters=0)
    path = folder / "checkpoints" / "global_step2" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 9', 1))
    with pytest.raises(CheckpointError, match=r"version = 9: This installation reads .* Update the library"):
        start(folder, eval_iters=0)


def test_nothing_whole_is_left(folder: Path) -> None:
    start(folder, eval_iters=0)
    os.truncate(folder / "checkpoints" / "global_step2" / "rank_00000.safetensors", 5000)
    with pytest.raises(CheckpointError, match="No other complete checkpoint lies beside it: restore the file"):
        start(folder, eval_iters=0)


def test_full_disk_costs_no_checkpoint_and_does_not_stop_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start(folder)
    usage = shutil.disk_usage(folder)
    full = {"number": 0}

    def shrinking(path: Path | str) -> Any:
        full["number"] += 1
        return usage._replace(free=0) if full["number"] == 1 else usage

    monkeypatch.setattr(local_storage.shutil, "disk_usage", shrinking)
    start(folder, train_iters=6, override_lr_scheduler=True)
    shown = capfd.readouterr().err
    assert "training goes on" in shown
    assert "free" in shown
    assert sorted(entry.name for entry in (folder / "checkpoints").glob("global_step*")) == [
        "global_step2",
        "global_step6",
    ]
