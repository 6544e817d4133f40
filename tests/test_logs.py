from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron import logs, whereabouts


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    logs.setup()


def test_information_comes_from_rank_0_only(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(0)
    logs.get_logger("megatron.data").info("hello")
    logs.setup(1, "rank 1 dp1")
    logs.get_logger("megatron.data").info("nobody reads this")
    assert capsys.readouterr().err == "hello\n"


def test_warnings_name_rank_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(3, "rank 3 dp1 tp1")
    logger = logs.get_logger("megatron.data")
    logger.warning("slow disk")
    whereabouts.begin_step(12)
    logger.error("no disk")
    assert capsys.readouterr().err == "[warning rank 3 dp1 tp1] slow disk\n[error rank 3 dp1 tp1 step 12] no disk\n"


def test_a_level_that_is_none_is_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOGLEVEL", "debug")
    logs.setup()
    logs.get_logger("x").debug("a detail")
    monkeypatch.setenv("LOGLEVEL", "chatty")
    logs.setup()
    logs.get_logger("x").debug("another")
    assert capsys.readouterr().err == "a detail\n"
