"""The command line that follows a script's name: config files, general overrides, and GPT-NeoX's own flags."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.config.load import read
from megatron.config.yaml_reader import SUFFIXES
from megatron.errors import ConfigError, Problem

# GPT-NeoX's flags, each a short way to set one key: (flags, key, help).
_KEY_FLAGS = (
    (("--wandb_group",), "wandb_group", "Weights & Biases group"),
    (("--wandb_run_name",), "wandb_run_name", "Weights & Biases name of the run"),
    (("--wandb_team",), "wandb_team", "Weights & Biases team"),
    (("--iteration",), "iteration", "step of the checkpoint to load"),
    (("-H", "--hostfile"), "hostfile", "file with one line `name slots=8` for each machine"),
    (("-i", "--sample_input_file"), "sample_input_file", "prompts for generate.py"),
    (("-o", "--sample_output_file"), "sample_output_file", "where generate.py writes its samples"),
)
_ABSENT = {
    "--eval_tasks": "evaluation with lm-eval is not part of this version.",
    "--eval_results_prefix": "evaluation with lm-eval is not part of this version.",
    "--autotuning": "DeepSpeed's autotuner is not used.",
}


@dataclass(frozen=True)
class Arguments:
    """What the user asked for. overrides: `key=value` texts, later ones winning, as `--set` and the flags gave them."""

    config_files: list[str] = field(default_factory=list)
    config_dir: str | None = None
    overrides: list[str] = field(default_factory=list)
    check: bool = False
    show: bool = False

    def command_line(self) -> str:
        """Return these arguments as a person would type them, without --check and --print."""
        words = list(self.config_files)
        if self.config_dir:
            words = ["-d", self.config_dir, *words]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words)


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of leaving the program."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise ConfigError with what argparse says."""
        fix = "Any key can be set with --set key=value; ./deepy.py --help shows the flags."
        raise ConfigError(Problem("command line", f"{message}.", fix))


def build_parser(program: str = "./deepy.py train.py") -> argparse.ArgumentParser:
    """Return the parser of everything that follows the script's name."""
    parser = Parser(prog=program, allow_abbrev=False, description="Run a script with the merged config files.")
    parser.add_argument("config_files", nargs="*", metavar="config", help="YAML or JSON files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", dest="config_dir", metavar="DIR", help="folder of the config files")
    parser.add_argument(
        "--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override any key"
    )
    parser.add_argument("--check", action="store_true", help="validate, show what follows from the config, and stop")
    parser.add_argument("--print", dest="show", action="store_true", help="show the command that would run, and stop")
    for flags, key, text in _KEY_FLAGS:
        parser.add_argument(*flags, dest=key, help=text, type=int if key == "iteration" else str)
    return parser


def parse_arguments(argv: list[str], program: str = "train.py") -> Arguments:
    """Return the arguments of a script's command line.

    Raises ConfigError for what cannot be understood, for flags of GPT-NeoX that have no feature behind them here,
    for `--set` without `=`, and where no config file is named. Leaves the program after --help.
    """
    absent, rest = _without_absent(argv)
    if absent:
        raise ConfigError(*absent, *_problems_of(rest, program))
    values = vars(build_parser(program).parse_args(argv))
    overrides = list(values["overrides"])
    require_assignments(overrides)
    overrides += [f"{key}={json.dumps(values[key])}" for _, key, _ in _KEY_FLAGS if values[key] is not None]
    if not values["config_files"]:
        raise ConfigError(
            Problem(program, "needs at least one config file.", f"Write: {program} configs/quickstart.yml")
        )
    return Arguments(values["config_files"], values["config_dir"], overrides, values["check"], values["show"])


def _without_absent(argv: list[str]) -> tuple[list[Problem], list[str]]:
    """Return a problem for each flag that has no feature here, and the words without these flags and their values."""
    problems, rest, in_values = [], [], False
    for word in argv:
        flag = word.split("=", 1)[0]
        if flag in _ABSENT:
            problems.append(Problem(flag, _ABSENT[flag], "Leave the flag out."))
            in_values = flag == word
        elif not in_values or word.startswith("-") or word.endswith(SUFFIXES):
            rest.append(word)
            in_values = False
    return problems, rest


def _problems_of(argv: list[str], program: str) -> Sequence[Problem]:
    """Return what is wrong with a command line and with the config that it names."""
    try:
        arguments = parse_arguments(argv, program)
        read(arguments.config_files, arguments.config_dir, arguments.overrides).resolve(planning=True)
    except ConfigError as error:
        return error.problems
    return ()


def require_assignments(overrides: list[str]) -> None:
    """Raise ConfigError where a text after `--set` is not key=value."""
    fix = "Put config files before --set, and write --set key=value."
    odd = [Problem(f"--set {text}", "is not key=value.", fix) for text in overrides if "=" not in text]
    if odd:
        raise ConfigError(*odd)
