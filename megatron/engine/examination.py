"""What the ranks saw of a step that they did again, put together: where the first bad value is, norms, losses.

The cause is the first that holds of:

    parameter    a weight (or its master) is not finite: the first in forward order
    activation   a module is given, or returns, such a value: the first that a micro-batch comes to
    gradient     a weight's gradient is not finite: the last in forward order, where the backward pass came first
    loss         none of these, and the loss is not finite
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """What one rank saw. axes: its place, by the names of the axes.

    order: its weights in forward order. split: those of which it has a share on the tensor axis. parameters: weights
    that are not finite. activations, gradients: (micro-batch, number of the look, place) of bad values, in the order
    of time. squares: of each weight's reduced gradient. losses, tokens: sums by micro-batch, on ranks that have them.
    """

    rank: int
    axes: dict[str, int]
    order: list[str]
    split: list[str]
    parameters: list[str] = field(default_factory=list)
    activations: list[tuple[int, int, str]] = field(default_factory=list)
    gradients: list[tuple[int, int, str]] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cause:
    """Where the first bad value is. kind: "parameter", "activation", "gradient" or "loss". layer: canonical name, ""
    for the loss. place: which tensor. rank: in the world, the first that saw it. micro_batch: None where it has none.
    """

    kind: str
    layer: str
    place: str
    rank: int
    micro_batch: int | None = None

    def __str__(self) -> str:
        of = {
            "parameter": f"the weight {self.place}",
            "activation": f"the {self.place}",
            "gradient": f"the gradient of {self.place}",
            "loss": "the loss itself",
        }[self.kind]
        where = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"{self.layer + ': ' if self.layer else ''}{of}, first on rank {self.rank}{where}"


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one data parallel rank. loss: mean over its trained tokens, nats."""

    dp_rank: int
    number: int
    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Examination:
    """What all ranks saw.

    cause: None where everything was finite this time. norms: L2 norm of each layer's gradient, unclipped, in forward
    order. bad_weights: weights with values that are not finite, bad_gradients: those whose gradient has such, both
    in forward order. passed: what else was bad, as (rank, micro-batch, place), a few of each rank.
    """

    cause: Cause | None
    norms: dict[str, float]
    micro_batches: list[MicroBatch]
    bad_weights: list[str]
    bad_gradients: list[str]
    passed: list[tuple[int, int, str]]


def layer_of(name: str) -> str:
    """Return the layer of a parameter or module: `layers.3` of `layers.3.mlp.up.weight`, `embedding` of others."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def put_together(ranks: Sequence[Seen]) -> Examination:
    """Return what all ranks saw."""
    order = _forward_order(ranks)
    squares = _squares(ranks)
    bad_weights = [name for name in order if any(name in seen.parameters for seen in ranks)]
    bad_gradients = [name for name in order if not math.isfinite(squares.get(name, 0.0))]
    micro_batches = _micro_batches(ranks)
    norms: dict[str, float] = {}
    for name in order:
        if name in squares:
            norms[layer_of(name)] = norms.get(layer_of(name), 0.0) + squares[name]
    passed = [
        (seen.rank, micro, place) for seen in ranks for micro, _, place in (seen.activations + seen.gradients)[:5]
    ]
    return Examination(
        cause=_cause(ranks, bad_weights, bad_gradients, micro_batches),
        norms={layer: math.sqrt(square) for layer, square in norms.items()},
        micro_batches=micro_batches,
        bad_weights=bad_weights,
        bad_gradients=bad_gradients,
        passed=passed,
    )


def _cause(
    ranks: Sequence[Seen], weights: list[str], gradients: list[str], micro_batches: list[MicroBatch]
) -> Cause | None:
    if weights:
        rank = next(seen.rank for seen in ranks if weights[0] in seen.parameters)
        return Cause("parameter", layer_of(weights[0]), weights[0], rank)
    found = [
        (micro, seen.axes["pp"], look, seen.rank, place) for seen in ranks for micro, look, place in seen.activations
    ]
    if found:
        micro, _, _, rank, place = min(found)
        return Cause("activation", layer_of(place.partition(" of ")[2]), place, rank, _number(micro))
    if gradients:
        backward = [(micro, -seen.axes["pp"], look, seen.rank) for seen in ranks for micro, look, _ in seen.gradients]
        micro, _, _, rank = min(backward, default=(-1, 0, 0, ranks[0].rank))
        return Cause("gradient", layer_of(gradients[-1]), gradients[-1], rank, _number(micro))
    bad = next((each for each in micro_batches if not math.isfinite(each.loss)), None)
    if bad is None:
        return None
    rank = next(seen.rank for seen in ranks if seen.axes["dp"] == bad.dp_rank and bad.number in seen.losses)
    return Cause("loss", "", "", rank, bad.number)


def _number(micro_batch: int) -> int | None:
    return None if micro_batch < 0 else micro_batch


def _forward_order(ranks: Sequence[Seen]) -> list[str]:
    """Return all weights, stage by stage; one that stages share stands where the first of them has it."""
    stages = sorted(ranks, key=lambda seen: seen.axes["pp"])
    return list(dict.fromkeys(name for seen in stages for name in seen.order))


def _squares(ranks: Sequence[Seen]) -> dict[str, float]:
    """Return the square of each weight's gradient, over the shares of the tensor axis; replicas have the same."""
    found: dict[str, dict[int, float]] = {}
    for seen in ranks:
        for name, square in seen.squares.items():
            share = seen.axes["tp"] if name in seen.split else 0
            found.setdefault(name, {}).setdefault(share, square)
    return {name: sum(shares.values()) for name, shares in found.items()}


def _micro_batches(ranks: Sequence[Seen]) -> list[MicroBatch]:
    """Return each data parallel rank's micro-batches; ranks of the context axis have parts of them."""
    sums: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}
    for seen in ranks:
        for number, loss in seen.losses.items():
            parts: dict[int, Any] = sums.setdefault((seen.axes["dp"], number), {})
            parts.setdefault(seen.axes["cp"], (loss, seen.tokens[number]))
    result = []
    for (dp_rank, number), parts in sorted(sums.items()):
        tokens = sum(part[1] for part in parts.values())
        result.append(
            MicroBatch(dp_rank, number, sum(part[0] for part in parts.values()) / max(1, tokens), int(tokens))
        )
    return result
