"""What a run that goes on compares with its checkpoint: the learning rate and the next samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron.checkpoint.load import CheckpointReader
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.gpt import Samples
from megatron.errors import CheckpointError, ConfigError
from megatron.optim.schedules import learning_rate
from megatron.training.same_samples import NEXT_SAMPLES, record_next, require_same_samples
from megatron.training.same_schedule import with_agreed_schedule
from tests.end_to_end.tiny import settings

ADAM = {"type": "Adam", "params": {"lr": 0.02, "betas": [0.9, 0.95]}}


def reader(config: Config, iteration: int, **extra: Any) -> CheckpointReader:
    manifest = SimpleNamespace(
        config=config.model_dump(mode="json"), progress={"iteration": iteration}, extra=extra, topology={}
    )
    return cast(CheckpointReader, SimpleNamespace(manifest=manifest, folder=Path("run/global_step4")))


def rates(config: Config) -> list[float]:
    iters = config.training.train_iters or 0
    return [learning_rate(config.optimizer, iters, step) for step in range(4, iters)]


def test_the_same_schedule_goes_on_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve(settings(tmp_path))
    assert with_agreed_schedule(config, reader(config, 4)) is config
    longer = {"train_iters": 16, "lr_decay_style": "constant", "warmup": 0.0}
    then, now = resolve(settings(tmp_path, **{**longer, "train_iters": 8})), resolve(settings(tmp_path, **longer))
    assert with_agreed_schedule(now, reader(then, 4)) is now  # other horizons, the same rates
    assert caplog.text == ""


def test_a_longer_run_is_told_both_rates_and_what_to_write(tmp_path: Path) -> None:
    then, now = resolve(settings(tmp_path)), resolve(settings(tmp_path, train_iters=16))
    with pytest.raises(CheckpointError) as caught:
        with_agreed_schedule(now, reader(then, 4))
    message = str(caught.value)
    assert message.startswith("run/global_step4: learning rate at iteration 4: 0.00507933")
    assert f"-> {learning_rate(now.optimizer, 16, 4):.6g}: this run has another schedule" in message
    assert "(horizon 8 -> 16). train_iters is the horizon of the decay where lr_decay_iters is not set." in message
    assert "Set use_checkpoint_lr_scheduler: true" in message
    assert "or override_lr_scheduler: true" in message


def test_one_of_two_keys_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = {"train_iters": 16, "optimizer": ADAM, "lr_decay_style": "linear", "min_lr": 0.001}
    then = resolve(settings(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"lr 0\.01 -> 0\.02, min_lr 0\.0 -> 0\.001, lr_decay_style cosine -> lin"
    ):
        with_agreed_schedule(resolve(settings(tmp_path, **{**changed, "train_iters": 8})), reader(then, 4))
    ours = resolve(settings(tmp_path, **changed, override_lr_scheduler=True))
    assert with_agreed_schedule(ours, reader(then, 4)) is ours
    assert "learning rate at iteration 4: 0.00507933" in caplog.text
    theirs = resolve(settings(tmp_path, **changed, use_checkpoint_lr_scheduler=True))
    kept = with_agreed_schedule(theirs, reader(then, 4))
    assert rates(kept)[:4] == rates(then)
    assert rates(kept)[4:] == [0.0] * 8
    assert kept.optimizer.optimizer["params"]["betas"] == [0.9, 0.95]
    assert with_agreed_schedule(theirs, reader(then, 0)) is theirs  # nothing was trained yet


def test_both_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override_lr_scheduler = true: use_checkpoint_lr_scheduler = true asks for"):
        resolve(settings(tmp_path, override_lr_scheduler=True, use_checkpoint_lr_scheduler=True))


class Numbers:
    """Samples whose tokens are their number times `factor`."""

    def __init__(self, count: int, factor: int = 1) -> None:
        self.count, self.factor = count, factor

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Any) -> Samples:
        return Samples(np.repeat(indices[:, None] * self.factor, 5, axis=1))


def test_the_next_samples_are_known_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = resolve(settings(tmp_path))
    record = record_next(Numbers(1000), 40)
    assert (record["first"], record["count"]) == (40, 64)
    assert record_next(Numbers(1000), 990)["count"] == 10
    checkpoint = reader(config, 4, train_order="a", **{NEXT_SAMPLES: record})
    require_same_samples(Numbers(1000), checkpoint, 40, "a")
    require_same_samples(Numbers(2000), checkpoint, 40, "b")  # more data, of which the next samples are the same
    assert "others" not in caplog.text
    require_same_samples(Numbers(1000, 2), checkpoint, 40, "b")  # other data on purpose
    assert "the next samples, from 40 on, are others than the checkpoint expects" in caplog.text
    with pytest.raises(CheckpointError, match=r"the 64 samples from number 40 on: they are others.*finetune: true"):
        require_same_samples(Numbers(1000, 2), checkpoint, 40, "a")
    require_same_samples(Numbers(1000, 2), reader(config, 4), 40, "a")  # from before there was a record
