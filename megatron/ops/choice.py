"""Which implementation of each operation a run uses: chosen once, at the start, and shown in one table.

    choices = choose({"rms_norm": "auto"}, Situation(torch.device("cuda"), torch.bfloat16, 4096), CATALOGUE)
    norm = choices.get("rms_norm", rms_norm)
    print(choices.table())

`CATALOGUE` (catalogue.py) lists for each operation what can compute it. What is asked for settles the order:

    auto   on a GPU the fastest that was measured there (measured.py), and where nothing was measured eager; on a CPU
           what was written for it, and else eager
    true   the fused ones in the catalogue's order, wherever they can run
    name   this one
    false  eager

The first that is installed, runs on the device and agrees there with the formula in fp32, gradients included, is
taken. Eager always can be; whatever was asked for and cannot be had is in the table with its own words.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Asked = str | bool
"""auto, true, false, or the name of a candidate."""

EAGER = "eager"
UNMEASURED = "auto: nothing was measured on this device"


@dataclass(frozen=True)
class Situation:
    """Where operations run. hidden_size: features of a token; of attention, of a head. length: tokens of a row."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    length: int = 0


@dataclass(frozen=True)
class Candidate:
    """Something that computes an operation.

    place: "module:function", imported only where it is to be used. package: what must be installed, or "".
    ready: "module:function" that makes it ready on a device and returns why it cannot be, or ""; "": nothing needs to.
    device: the type of device that it runs on, or "" for every one.
    """

    name: str
    place: str
    package: str = ""
    ready: str = ""
    device: str = "cuda"

    def load(self) -> Function:
        """Return the function; whatever its import raises is raised."""
        return _function(self.place)

    def obstacle(self, situation: Situation) -> str:
        """Return why it cannot be used here, or ""."""
        if self.name == EAGER or not self.device:
            return ""
        if situation.device.type != self.device:
            return f"needs a {self.device.upper()} device, and this is {situation.device.type}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return str(_function(self.ready)(situation.device)) if self.ready else ""


def _function(place: str) -> Function:
    module, _, name = place.partition(":")
    function: Function = getattr(importlib.import_module(module), name)
    return function


Probe = Callable[[Function, torch.device, torch.dtype, int], Sequence[Tensor]]
"""probe(function, device, dtype, hidden_size) -> outputs and gradients of fixed inputs, small but odd."""


@dataclass(frozen=True)
class Operation:
    """What can be computed in several ways.

    twin: "module:function" of the formula, with the signature of all candidates.
    candidates: of which the first is eager, the others in order of preference.
    unmeasured: the candidate that "auto" tries on a GPU where nothing was measured.
    """

    name: str
    twin: str
    candidates: tuple[Candidate, ...]
    probe: Probe
    unmeasured: str = EAGER

    def formula(self) -> Function:
        """Return the twin."""
        return Candidate("twin", self.twin).load()


@dataclass(frozen=True)
class Choice:
    """What computes an operation. refused: what came before it in the order, with the reason."""

    operation: str
    candidate: str
    why: str
    function: Function
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Choices:
    """What computes each operation of a run; none at all is PyTorch's own for everything."""

    choices: tuple[Choice, ...] = ()

    def get(self, operation: str, otherwise: Function) -> Function:
        """Return what computes an operation, or `otherwise` where it is not among the choices."""
        return next((choice.function for choice in self.choices if choice.operation == operation), otherwise)

    def fused(self, operation: str | None) -> Function | None:
        """Return what computes an operation, or None where that is eager, or not among the choices."""
        fused = (choice for choice in self.choices if choice.candidate != EAGER)
        return next((choice.function for choice in fused if choice.operation == operation), None)

    def refused(self) -> bool:
        """Return whether something was to be used and could not be."""
        return any(choice.refused for choice in self.choices)

    def table(self) -> str:
        """Return a line for each operation: what computes it, why, and why not something else."""
        rows = [("operation", "computed by", "because")]
        for choice in self.choices:
            rows.append((choice.operation, choice.candidate, choice.why))
            rows.extend(("", f"not {name}", reason) for name, reason in choice.refused)
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {what:{widths[1]}}  {why}" for name, what, why in rows)


def choose(
    asked: Mapping[str, Asked],
    situation: Situation,
    catalogue: Mapping[str, Operation],
    measured: Callable[[str, Situation], str | None] = lambda operation, situation: None,
) -> Choices:
    """Return what computes each operation named in `asked`.

    measured: the name of the fastest candidate where that is known, for "auto".
    """
    fastest = {name: measured(name, situation) for name in asked}
    return Choices(tuple(_choose(catalogue[name], wish, situation, fastest[name]) for name, wish in asked.items()))


def _choose(operation: Operation, wish: Asked, situation: Situation, fastest: str | None) -> Choice:
    refused: list[tuple[str, str]] = []
    for candidate, why in _order(operation, wish, situation, fastest):
        reason = candidate.obstacle(situation) or _disagreement(operation, candidate, situation)
        if not reason:
            return Choice(operation.name, candidate.name, why, candidate.load(), tuple(refused))
        refused.append((candidate.name, reason))
    raise AssertionError(f"{operation.name} has no eager candidate")


def _order(operation: Operation, wish: Asked, situation: Situation, fastest: str | None) -> list[tuple[Candidate, str]]:
    """Return the candidates to try, each with the reason for which it would be taken; eager is the last."""
    eager, *fused = operation.candidates
    if wish is False:
        return [(eager, "false was asked for")]
    if wish == "auto":
        kind = situation.device.type
        if kind != "cuda":
            written_for_it = [(each, f"auto on {kind}") for each in fused if each.device == kind]
            return [*written_for_it, (eager, f"auto on {kind}")]
        why = "auto: the fastest measured on this device"
        if fastest is None:
            fastest, why = operation.unmeasured, UNMEASURED
            if fastest == EAGER:
                return [(eager, why)]
        return [*((each, why) for each in operation.candidates if each.name == fastest), _last(eager)]
    if wish is True:
        return [*((each, "true was asked for") for each in fused), _last(eager)]
    named = [(each, f"{wish} was asked for") for each in operation.candidates if each.name == wish]
    return [*named, _last(eager)] if named else [(eager, f"there is no {wish} for it")]


def probe_device(situation: Situation) -> torch.device:
    """Return where candidates are compared with their formulae."""
    return situation.device


def _last(eager: Candidate) -> tuple[Candidate, str]:
    return eager, "runs everywhere"


def _disagreement(operation: Operation, candidate: Candidate, situation: Situation) -> str:
    """Return how the candidate fails on the device, in its own words, or differs from the formula; "" if neither."""
    if candidate is operation.candidates[0]:
        return ""
    device = probe_device(situation)
    try:
        found = operation.probe(candidate.load(), device, situation.dtype, situation.hidden_size)
        exact = operation.probe(operation.formula(), device, torch.float32, situation.hidden_size)
    except Exception as error:  # whatever an optional library or a compiler raises: it cannot be used here
        return " ".join(f"{type(error).__name__}: {error}".split())
    for number, (one, other) in enumerate(zip(found, exact, strict=True)):
        difference = (one.float() - other).abs().max().item()
        allowed = 8 * torch.finfo(situation.dtype).eps * max(1.0, other.abs().max().item())
        if not difference <= allowed:
            return (
                f"differs from the formula by {difference:.2g} in value {number} of the probe (allowed {allowed:.2g})"
            )
    return ""
