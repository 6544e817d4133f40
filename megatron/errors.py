"""What a user can do wrong, said in four parts: what, where, why, and the fix in a form to copy.

Every error that a user can cause derives from `DeepyError`; the command line prints it without a
traceback and exits with its `exit_code`. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the four parts that a user needs to mend it.

    what: the setting or object and its value, such as `num_attention_heads = 12`.
    why: the reason it cannot stand, with the numbers.
    fix: what to write or run instead, in a form to copy.
    where: `file:line`, a tensor's name and shape, or "" where there is no place.
    """

    what: str
    why: str
    fix: str
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}: {self.why} {self.fix}".rstrip()


class DeepyError(Exception):
    """A mistake that the user can mend; `problems` holds all that were found at once."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[DeepyError], tuple[Problem, ...]]:
        return type(self), tuple(self.problems)


class ConfigError(DeepyError):
    """Problems of YAML files, command-line overrides or their combination."""


class TokenizerError(DeepyError):
    """A tokenizer that cannot be loaded, or that does not fit the data."""


class DataError(DeepyError):
    """A data file that is missing, truncated, of another format, or unfit for the model."""


class CheckpointError(DeepyError):
    """A checkpoint that is missing, damaged, or of another model, or that could not be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not as they were written, so that an earlier one may stand in for it."""


class EngineError(DeepyError):
    """The live engine differs from the config, or a combination that the engine cannot run."""


class DivergedError(EngineError):
    """A run whose numbers are not finite any more, and which nothing that the engine can do will mend."""


class MemoryShortageError(DeepyError):
    """A run that does not fit into the memory of its device, with what it held and what would help."""

    exit_code = 1


class ExportError(DeepyError):
    """Weights that cannot be converted, or whose conversion does not compute the same logits."""


class KernelError(DeepyError):
    """A kernel that cannot be built or loaded on this machine."""


class LaunchError(DeepyError):
    """Workers that cannot be started, or a worker that failed."""

    exit_code = 1
