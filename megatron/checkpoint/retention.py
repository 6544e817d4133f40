"""When to save, and which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable

from megatron import logs
from megatron.checkpoint.steps import delete_step, whole_steps
from megatron.checkpoint.storage import Storage
from megatron.config.schema.run import CheckpointConfig

logger = logs.get_logger(__name__)


def save_iterations(config: CheckpointConfig, train_iters: int) -> list[int]:
    """Return the iterations in [0, train_iters] after which a run saves, in order; none without `save`.

    With factor k, "linear" saves at k, 2k, 3k ... and "log" at 1, k, k^2 ... (rounded to whole steps);
    `extra_save_iters` adds its own, of which 0 is the initial model; the last iteration is always saved.
    """
    if config.save is None:
        return []
    wanted = {step for step in config.extra_save_iters or [] if 0 <= step <= train_iters}
    factor = config.checkpoint_factor
    if factor is not None:
        power = 0
        while (step := _step(config.checkpoint_scale, factor, power)) < train_iters:
            wanted.add(step)
            power += 1
    return sorted(wanted | {train_iters})


def _step(scale: str, factor: float, index: int) -> int:
    """Return the index-th regular save, counted from 0."""
    return round(factor**index) if scale == "log" else round(factor * (index + 1))


def prune(root: Storage, saved: int, keep_last: int | None) -> None:
    """Delete the oldest checkpoints before `saved` so that `keep_last` remain; None keeps all.

    Checkpoints of later iterations belong to another run in the same folder; they are named and left alone.
    What fails here is a warning: the save itself has succeeded.
    """
    try:
        later = [step for step in whole_steps(root) if step > saved]
        if later:
            logger.warning(
                "%s also holds checkpoints of later iterations (%s), of another run; they are left alone, and `latest` "
                "now names global_step%d",
                root,
                ", ".join(map(str, later)),
                saved,
            )
        if keep_last is not None:
            keep_earlier(root, saved, keep_last - 1)
    except OSError as error:
        logger.warning("old checkpoints in %s could not be looked for: %s", root, error)


def keep_earlier(root: Storage, iteration: int, number: int, good: Iterable[int | None] = ()) -> None:
    """Delete the oldest checkpoints before `iteration` so that at most `number` of them remain, and those in `good`."""
    steps = whole_steps(root)
    earlier = [step for step in steps if step < iteration]
    for step in earlier[: max(0, len(earlier) - number)]:
        if step in good:
            continue
        try:
            delete_step(root, steps[step])
        except OSError as error:
            logger.warning("the old checkpoint %s could not be deleted: %s", steps[step], error)
