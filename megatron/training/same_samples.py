"""A checkpoint records which samples come next, and a run that goes on from it reads the same ones or stops.

The record is a hash of the tokens of the next samples in the order in which the run takes them, so it is alike for
every layout, micro-batch and global batch, and it knows a data file whose content was replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from megatron.checkpoint.load import CheckpointReader
from megatron.data.gpt import SampleReader
from megatron.errors import CheckpointError, Problem
from megatron.logs import get_logger

logger = get_logger(__name__)

NEXT_SAMPLES = "next_samples"  # the name of the record among what a manifest holds besides
_COUNT = 64  # samples: two steps of a small batch, the beginning of a step of a large one


def record_next(samples: SampleReader, consumed: int, count: int = _COUNT) -> dict[str, Any]:
    """Return the record of the `count` samples that follow the first `consumed`, fewer at the end of the data set."""
    first = consumed % len(samples)
    indices = np.arange(first, min(first + count, len(samples)), dtype=np.int64)
    found = samples.read(indices)
    digest = xxhash.xxh3_128(np.ascontiguousarray(found.text).data)
    if found.labels is not None:
        digest.update(np.ascontiguousarray(found.labels).data)
    return {"first": consumed, "count": len(indices), "digest": digest.hexdigest()}


def require_same_samples(samples: SampleReader, reader: CheckpointReader, consumed: int, train_order: object) -> None:
    """Compare what comes next with the checkpoint's record; one without a record passes.

    train_order: of this run, see `DataSets`. Where the checkpoint's is another, the data was changed on purpose, which
    has been said already. Raises CheckpointError where the data looks the same and other samples come.
    """
    record: Mapping[str, Any] | None = reader.manifest.extra.get(NEXT_SAMPLES)
    if record is None:
        return
    same_order = reader.manifest.extra.get("train_order") == train_order
    found = record_next(samples, consumed, int(record["count"])) if len(samples) else {}
    if found == record:
        logger.info("the next samples, from %s on, are those that the checkpoint expects", f"{consumed:,}")
    elif not same_order or found.get("first") != record["first"]:
        logger.warning("the next samples, from %s on, are others than the checkpoint expects", f"{consumed:,}")
    else:
        raise CheckpointError(
            Problem(
                where=str(reader.folder),
                what=f"the {record['count']} samples from number {consumed:,} on",
                why=f"they are others than this run would have read next (hash {found['digest'][:12]}, and "
                f"{record['digest'][:12]} in the checkpoint): a data file has the same lengths of documents as before "
                "and other tokens.",
                fix="Restore the data files. To go on with other data on purpose, set load to this checkpoint, "
                "finetune: true and another save.",
            )
        )
