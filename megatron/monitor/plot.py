"""The loss plot of a run, drawn from its metrics.jsonl: `python -m megatron.monitor.plot runs/quickstart`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron.monitor.metrics import read_metrics, series

INSTALL = "pip install matplotlib"


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Return the exponential moving average of values, corrected for its start (Kingma and Ba 2015, section 3)."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


MOST_POINTS = 4000
"""More steps than this are thinned out evenly: a plot has fewer pixels."""


def _thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    stride = -(-len(steps) // MOST_POINTS)
    return (steps[::stride], values[::stride]) if stride > 1 else (steps, values)


_MARKS: dict[str, dict[str, Any]] = {
    "spike": {"marker": "v", "color": "tab:red", "markersize": 6},
    "not_finite": {"marker": "X", "color": "black", "markersize": 6},
    "rollback": {"marker": "<", "color": "tab:purple", "markersize": 7},
}


def plot_loss(metrics: Path, image: Path, title: str) -> None:
    """Draw training and validation loss over the iterations, marks at what was left out, and the learning rate below.

    Raises ImportError where matplotlib is missing. Without any step there is nothing to draw, and no file.
    """
    records = read_metrics(metrics)
    steps, losses = series(records, "step", "loss")
    if not steps:
        return
    # The object interface: no global state, and no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot(*_thin(steps, losses), color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
    weight = max(0.0, min(0.95, 1 - 20 / len(losses)))
    upper.plot(*_thin(steps, smooth(losses, weight)), color="tab:blue", linewidth=1.6, label="training, smoothed")
    valid_steps, valid_losses = series(records, "validation", "loss")
    if valid_steps:
        upper.plot(valid_steps, valid_losses, "o-", color="tab:orange", markersize=4, label="validation")
        upper.annotate(
            f"{valid_losses[-1]:.3f}",
            (valid_steps[-1], valid_losses[-1]),
            (0, 7),
            textcoords="offset points",
            ha="right",
        )
    lowest, highest = min(losses), max(losses)
    for kind, mark in _MARKS.items():
        places = [record for record in records if record["event"] == kind]
        if places:
            # A rollback stands at the step it led back to; a loss that is unknown, or off the scale, at the edge.
            at = [record.get("back_to", record["iteration"]) for record in places]
            heights = [min(highest, highest if record.get("loss") is None else record["loss"]) for record in places]
            heights = [lowest] * len(places) if kind == "rollback" else heights
            label = f"{kind.replace('_', ' ')} ({len(places)})"
            upper.plot(at, heights, linestyle="", label=label, clip_on=False, zorder=3, **mark)
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title)
    upper.legend()
    upper.grid(alpha=0.3)
    rate_steps, rates = series(records, "step", "learning_rate")
    lower.plot(*_thin(rate_steps, rates), color="tab:green", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("iteration")
    lower.grid(alpha=0.3)
    temporary = image.with_suffix(".part")
    figure.savefig(temporary, format="png")
    temporary.replace(image)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plot_loss(folder / "metrics.jsonl", folder / "loss.png", folder.name)
