from __future__ import annotations

import json
import math
from pathlib import Path

from megatron.monitor.metrics import MetricsFile, read_metrics, series


def write(path: Path, start: int, stop: int, loss: float) -> None:
    """A run from `start` that ends after step `stop`."""
    file = MetricsFile(path)
    file.write("start", start)
    for iteration in range(start + 1, stop + 1):
        file.write("step", iteration, loss=loss)
    file.close()


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write("step", 3, loss=1.23456789012, skipped=False, grad_norm=math.inf, name="x")
    record = json.loads(path.read_text())  # on the disk before the file is closed
    assert record.pop("time") > 1e9
    assert record == {
        "event": "step",
        "iteration": 3,
        "loss": 1.234568,
        "skipped": False,
        "grad_norm": None,
        "name": "x",
    }


def test_steps_past_the_resumed_iteration_are_superseded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 7, loss=9.0)
    write(path, 4, 6, loss=5.0)
    assert series(read_metrics(path), "step", "loss") == ([1, 2, 3, 4, 5, 6], [9.0, 9.0, 9.0, 9.0, 5.0, 5.0])
    assert len(path.read_text().splitlines()) == 1 + 7 + 1 + 2  # nothing is rewritten


def test_what_is_measured_again_where_a_run_resumes_counts_once(tmp_path: Path) -> None:
    lines = [("start", 0), ("step", 1), ("validation", 1), ("test", 1), ("start", 1), ("validation", 1), ("test", 1)]
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for number, (event, iteration) in enumerate(lines):
        file.write(event, iteration, loss=float(number))
    file.close()
    records = read_metrics(path)
    assert series(records, "validation", "loss") == ([1], [5.0])
    assert series(records, "test", "loss") == ([1], [6.0])
    assert series(records, "step", "loss") == ([1], [1.0])


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 2, loss=9.0)
    with path.open("a") as file:
        file.write('{"event": "step", "itera')
    write(path, 2, 3, loss=5.0)
    assert series(read_metrics(path), "step", "loss") == ([1, 2, 3], [9.0, 9.0, 5.0])


def test_values_that_are_missing_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write("step", 1, loss=math.nan)
    file.write("step", 2, loss=2.0)
    file.write("validation", 2, loss=3.0)
    file.close()
    assert series(read_metrics(path), "step", "loss") == ([2], [2.0])
