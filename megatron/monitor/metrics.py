"""`metrics.jsonl`: one JSON object per event of a run, appended, also by the runs that continue it.

    {"event": "step", "iteration": 12, "loss": 4.1, "learning_rate": 0.001, "grad_norm": 1.3, ...}
    {"event": "validation", "iteration": 100, "loss": 3.9}

A run that resumes at iteration N appends {"event": "start", "iteration": N}: the steps past N that stand above
that line were lost with the process that made them, and are superseded. So is a measurement that was made again, such
as the test of a finished run that was started once more, and so are the steps past `back_to` above
{"event": "rollback", "iteration": 12, "back_to": 10}; what was wrong with them still counts:

    {"event": "spike", "iteration": 12, "loss": 9.1, "loss_limit": 4.6, "samples": [48, 52], ...}
    {"event": "not_finite", "iteration": 12, "loss": null, "samples": [48, 52], ...}
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
MEASURED = ("validation", "test")
"""Events that a run may repeat for the iteration at which it resumes."""

INCIDENTS = ("spike", "not_finite", "rollback")
"""Events that stay true when the run goes back before them."""


class MetricsFile:
    """Appends records, each a whole line that is on its way to the disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        _end_with_newline(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, iteration: int, **values: Any) -> None:
        """Append one record. Numbers that are not finite become null, since JSON has no word for them."""
        record = {"event": event, "iteration": iteration, "time": round(time.time(), 3)}
        self._file.write(json.dumps({**record, **{key: _plain(value) for key, value in values.items()}}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_with_newline(path: Path) -> None:
    """Close a last line that a killed process left unfinished, so that the next record has a line of its own."""
    if path.exists() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def read_metrics(path: Path) -> list[Record]:
    """Return the records that count: superseded ones and a torn line are left out, in the order of the file."""
    records: list[Record] = []
    resumed_at = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed in the middle of the line
        if record.get("event") == "start":
            records = [old for old in records if old["iteration"] <= record["iteration"]]
            resumed_at = record["iteration"]
        elif record.get("event") in MEASURED and record["iteration"] <= resumed_at:
            same = (record["event"], record["iteration"])
            records = [old for old in records if (old["event"], old["iteration"]) != same]
        elif record.get("event") == "rollback":
            records = [old for old in records if old["iteration"] <= record["back_to"] or old["event"] in INCIDENTS]
        records.append(record)
    return records


def series(records: list[Record], event: str, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values of one number of one kind of event, those without a value left out."""
    chosen = [record for record in records if record["event"] == event and record.get(name) is not None]
    return [record["iteration"] for record in chosen], [float(record[name]) for record in chosen]
