"""One line of `./deepy.py doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report. problem: "" where all is well."""

    name: str
    value: str
    problem: str = ""

    def __str__(self) -> str:
        return f"  {self.name:<27} {self.value}" + (f"\n  {'':<27}   {self.problem}" if self.problem else "")
