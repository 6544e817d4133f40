from __future__ import annotations

import io
import sys

import pytest

from megatron import logs
from megatron.monitor.display import Bar, Lines, Shown, build_display, clock_time, fit
from megatron.monitor.throughput import Speed


def shown(iteration: int = 7, **changes: object) -> Shown:
    speed = Speed(0.1, 12345.6, 10.0)
    values = {"speed": speed, "seconds_left": 754.0, **changes}
    return Shown(iteration, 100, 2.5, 1e-3, 3.0, 1.0, **values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def messages() -> None:
    logs.setup()


def test_a_line_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    Lines(100, 10).show(shown())
    assert capsys.readouterr().err == (
        "iteration   7/100 | loss 2.5000 | lr 1.00e-03 | grad norm 3.00 -> 1.00 | 12,346 tokens/s | 12:34 left\n"
    )


def test_what_there_is_only_sometimes() -> None:
    speed = Speed(0.1, 12345.6, 10.0, 40.0, 0.412, 0.38, 0.412)
    texts = shown(speed=speed, loss_scale=1024.0, skipped=2).numbers()
    assert texts[-3:] == ["MFU 41.2% (38.0% causal)", "loss scale 1024", "2 skipped"]


def test_lines_come_at_the_interval_and_at_both_ends(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(25, 10)
    wanted = []
    for iteration in range(1, 26):
        if lines.is_due(iteration):
            wanted.append(iteration)
            lines.show(shown(iteration))
    assert wanted == [1, 10, 20, 25]
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_the_bar_shows_the_same_and_lets_messages_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    display = build_display(100, 0, 10)
    assert isinstance(display, Bar)
    assert display.is_due(1)
    display.show(shown(100))
    assert not display.is_due(50)
    logs.get_logger("test").info("a message")
    display.close()
    text = stream.getvalue()
    assert "100/100" in text
    assert "loss 2.5000" in text
    assert "a message" in text


def test_a_narrow_terminal_has_the_loss_and_the_speed() -> None:
    texts = shown().numbers()
    assert fit(texts, 200) == texts
    assert fit(texts, 50) == [texts[0], texts[1], "12,346 tok/s"]
    assert fit(texts, 30) == [texts[0], "12,346 tok/s"]


def test_80_columns_have_loss_rate_speed_mfu_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    bar = Bar(1000, 0)
    bar.show(shown(speed=Speed(0.1, 12345.6, 10.0, 40.0, 0.412, 0.38, 0.412)))
    bar.close()
    for part in ("loss 2.5000", "lr 1.00e-03", "12,346 tok/s", "MFU 41.2%", "12:34 left"):
        assert part in stream.getvalue()


def test_no_bar_without_a_terminal() -> None:
    assert isinstance(build_display(100, 0, 10), Lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11220, "3:07:00"), (183600, "2 d 03:00")],
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
