"""The report of a step that is not finite: one JSON file, from which its data and its layer can be found again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.data.loaders import MicroBatchSamples
from megatron.engine.examination import Examination
from megatron.training.guards import Incident

FOLDER = "not_finite"


def write_report(
    run_folder: Path,
    incident: Incident,
    examination: Examination,
    samples: Sequence[MicroBatchSamples],
    later_updates: int,
) -> Path:
    """Write `not_finite/step_<iteration>.json` into the run's folder, and return its path.

    samples: of the step, on all data parallel ranks. later_updates: that the weights had when the step was examined.
    Raises OSError where it cannot be written.
    """
    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{incident.iteration:08}.json"
    temporary = path.with_suffix(".part")
    report = _plain(_report(incident, examination, samples, later_updates))
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _report(
    incident: Incident, examination: Examination, samples: Sequence[MicroBatchSamples], later_updates: int
) -> dict[str, Any]:
    losses = {(each.dp_rank, each.number): each for each in examination.micro_batches}
    micro_batches = []
    for each in samples:
        found = losses.get((each.dp_rank, each.number))
        micro_batches.append(
            {
                "dp_rank": each.dp_rank,
                "micro_batch": each.number,
                "loss": None if found is None else found.loss,
                "num_tokens": None if found is None else found.num_tokens,
                "samples": each.indices,
                "documents": [asdict(origin) for origin in each.origins],
            }
        )
    return {
        "iteration": incident.iteration,
        "what": str(incident),
        "loss": incident.result.loss,
        "grad_norm": incident.result.grad_norm,
        "loss_scale": incident.result.loss_scale,
        "learning_rate": incident.result.learning_rate,
        "consumed_samples_before": incident.begin,
        "consumed_samples_after": incident.end,
        "updates_between_the_step_and_its_examination": later_updates,
        "first": None if examination.cause is None else {**asdict(examination.cause), "text": str(examination.cause)},
        "grad_norm_per_layer": examination.norms,
        "weights_not_finite": examination.bad_weights,
        "gradients_not_finite": examination.bad_gradients,
        "also_not_finite": [{"rank": r, "micro_batch": m, "place": place} for r, m, place in examination.passed],
        "micro_batches": micro_batches,
    }


def _plain(value: Any) -> Any:
    """Return JSON values: numbers that are not finite become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
