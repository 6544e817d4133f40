"""Samples as GPT-NeoX writes them: one JSON object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.errors import DataError, Problem
from megatron.generation.generate import Sample


def as_record(sample: Sample) -> dict[str, Any]:
    """Return the fields of one line: context, text, length (new tokens), finished, message, duration_seconds."""
    return {
        "context": sample.context,
        "text": sample.text,
        "length": len(sample.tokens),
        "finished": sample.finished,
        "message": sample.message,
        "duration_seconds": sample.duration_seconds,
    }


def write_records(path: Path, samples: Iterable[Sample]) -> None:
    """Write all samples to `path`, which appears whole or not at all. Raises DataError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(as_record(sample), ensure_ascii=False) + "\n" for sample in samples)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = f"It cannot be written ({error.strerror})."
        raise DataError(Problem(f"sample_output_file = {path}", why, "Give another file with -o out.jsonl.")) from error
