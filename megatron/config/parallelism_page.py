"""docs/parallelism.md: what combines with what, from the table that the errors are made from."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.combinations import LINES, NOTES, SHOWN, USES, Line, can_stand

_OPENING = """\
# What combines with what

Generated from `megatron/config/combinations.py` by `python -m megatron.config.reference`; do not edit.

Every layout computes the same training: the gradient of every parameter equals one process's, and
`./deepy.py parity CONFIG` shows that of a config of yours. What does not work is an error before anything starts, in
the words that stand here."""


def markdown() -> str:
    """Return the text of docs/parallelism.md."""
    return "\n".join([_OPENING, *_uses(), *_pairs(), *_reasons(), *_alone()]) + "\n"


def _uses() -> Iterator[str]:
    yield "\n## What a config can ask for\n"
    yield "| name | key | what it means |\n|---|---|---|"
    for name in SHOWN:
        yield f"| {name} | `{USES[name].key}` | {USES[name].means} |"


def _numbers() -> dict[tuple[str, str], int]:
    """Return a number for each reason (why, fix) of the lines between shown uses, in the order of the lines."""
    reasons = dict.fromkeys((line.why, line.fix) for line in LINES if _is_pair(line))
    return {reason: number for number, reason in enumerate(reasons, start=1)}


def _is_pair(line: Line) -> bool:
    return line.use in SHOWN and line.other in SHOWN


def _pairs() -> Iterator[str]:
    marks = {frozenset((note.use, note.other)): f"+{chr(ord('a') + index)}" for index, note in enumerate(NOTES)}
    numbers = _numbers()
    marks |= {frozenset((line.use, line.other)): str(numbers[line.why, line.fix]) for line in LINES if _is_pair(line)}
    yield "\n## Pairs\n"
    yield "`+` works, a letter is a note, a number is the reason why not; `-`: no third setting suits both.\n"
    yield "| | " + " | ".join(SHOWN) + " |\n|---|" + ":-:|" * len(SHOWN)
    for row in SHOWN:
        yield f"| **{row}** | " + " | ".join(_cell(row, column, marks) for column in SHOWN) + " |"


def _cell(row: str, column: str, marks: dict[frozenset[str], str]) -> str:
    if USES[row].key == USES[column].key:
        return ""
    return marks.get(frozenset((row, column)), "+" if can_stand(row, column) else "-")


def _reasons() -> Iterator[str]:
    yield ""
    for index, note in enumerate(NOTES):
        yield f"- {chr(ord('a') + index)}: {note.use} with {note.other}: {note.text}."
    for (why, fix), number in _numbers().items():
        named = [f"{line.use} with {line.other}" for line in LINES if (line.why, line.fix) == (why, fix)]
        yield f"- {number}: {', '.join(named)}: {why} {fix}"


def _alone() -> Iterator[str]:
    yield "\n## What else is refused\n"
    yield "| key | asks for | why | instead |\n|---|---|---|---|"
    for line in LINES:
        if not _is_pair(line):
            other = f" with {line.other}" if line.other else ""
            yield f"| `{USES[line.use].key}` | {line.use}{other} | {line.why} | {line.fix} |"
