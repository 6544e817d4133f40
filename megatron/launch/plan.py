"""`./deepy.py plan CONFIG`: does it fit, how long will it take, and what would be better; without GPUs or torch.

    ./deepy.py plan configs/20B.yml --gpus 96 --gpu-memory 40
    ./deepy.py plan configs/20B.yml --gpus 96 --gpu A100-80 --search

Exits with 0 where the run fits, 3 where it does not, 2 where the config is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron.config.load import read
from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.launch.arguments import Parser, require_assignments
from megatron.launch.check import vocabulary_size
from megatron.model.accounting import num_parameters, padded_vocab_size
from megatron.planning import micro_batch, report
from megatron.planning.layout import Layout
from megatron.planning.memory import GIBIBYTE, RESERVE
from megatron.planning.plan import Plan, Planner
from megatron.planning.search import Change, changes, search
from megatron.planning.speed import GPUS, Gpu, assume

DOES_NOT_FIT = 3
_PROGRAM = "./deepy.py plan"
_USUAL_GPU = "H100"


def main(argv: list[str]) -> int:
    """Print the plan; return 0 where the run fits, 3 where it does not.

    Raises ConfigError for a wrong config or command line, and where the file of --json cannot be written."""
    words = vars(_parser().parse_args(argv))
    require_assignments(words["overrides"])
    if not words["config_files"]:
        raise ConfigError(
            Problem(_PROGRAM, "needs at least one config file.", f"Write: {_PROGRAM} configs/125M.yml --gpus 8")
        )
    settings = read(words["config_files"], words["config_dir"], words["overrides"])
    resolution = settings.resolve(words["gpus"], planning=words["gpus"] is None)
    config, gpu = resolution.config, _find_gpu(words)
    _require_float8(config, gpu)
    vocab_size, is_known = vocabulary_size(config)
    planner = Planner(config, vocab_size, _assumptions(config, gpu, vocab_size, words), words["reserve"] * GIBIBYTE)
    limit = gpu.memory * GIBIBYTE
    now = planner.plan(_layout(planner, limit))
    best = search(planner, now.layout, limit) if words["search"] else []
    ways = changes(planner, now, limit) if now.peak > limit and not words["search"] else []
    print(f"{' + '.join(str(file) for file in settings.files)} on {now.layout.gpus} x {_name(gpu)}")
    guess = [] if is_known else [f"a vocabulary of {vocab_size:,} is a guess: the tokenizer's file is not here."]
    print("\n".join([*(f"[note] {notice}" for notice in [*resolution.notices, *guess]), report.describe(now.layout)]))
    print("\n".join(_sections(planner, now, limit, ways, best, words["search"])))
    if words["json"]:
        _write(Path(words["json"]), _data(config, planner, now, limit, ways, best))
    return 0 if now.peak <= limit else DOES_NOT_FIT


def _parser() -> Parser:
    parser = Parser(prog=_PROGRAM, allow_abbrev=False, description="Plan a run without GPUs.")
    parser.add_argument("config_files", nargs="*", metavar="config", help="YAML or JSON files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", dest="config_dir", metavar="DIR", help="folder of the config files")
    parser.add_argument(
        "--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override any key"
    )
    parser.add_argument("--gpus", type=_whole, metavar="N", help="GPUs of the run; unset: what the config implies")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="kind of GPU; unset: the smallest with --gpu-memory")
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="memory of a GPU, in GiB")
    parser.add_argument("--node", type=_whole, default=8, metavar="N", help="GPUs of one machine (8)")
    parser.add_argument(
        "--mfu", type=_share, metavar="SHARE", help="share of the peak that a GPU alone reaches, 0 to 1"
    )
    parser.add_argument("--network", type=_positive, metavar="GB/S", help="what a GPU sends to other machines, GB/s")
    parser.add_argument(
        "--reserve", type=_positive, default=RESERVE / GIBIBYTE, metavar="GIB", help="set aside for CUDA and NCCL (1.5)"
    )
    parser.add_argument("--search", action="store_true", help="rank all layouts of the run that fit")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON as well; bytes and seconds")
    return parser


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise ValueError
    return number


_whole.__name__, _positive.__name__, _share.__name__ = (
    "whole number above 0",
    "number above 0",
    "share above 0, up to 1",
)


def _find_gpu(words: dict[str, Any]) -> Gpu:
    """Return the GPU that was named, or else the smallest known one with the memory that was."""
    memory = words["gpu_memory"]
    if words["gpu"]:
        gpu = GPUS[words["gpu"]]
    elif memory:
        larger = [gpu for gpu in GPUS.values() if gpu.memory >= memory]
        gpu = min(larger or GPUS.values(), key=lambda gpu: gpu.memory if larger else -gpu.memory)
    else:
        gpu = GPUS[_USUAL_GPU]
    changed = {"memory": memory, "network": words["network"]}
    return dataclasses.replace(gpu, **{name: value for name, value in changed.items() if value})


def _layout(planner: Planner, limit: float) -> Layout:
    """Return the config's layout, with the largest micro-batch that fits where the config leaves it open."""
    layout = Layout.of(planner.config)
    if not planner.config.batch.find_micro_batch_size:
        return layout
    return micro_batch.sized(layout, micro_batch.largest(planner, layout, limit) or 1)


def _require_float8(config: Config, gpu: Gpu) -> None:
    if config.numerics.precision == "fp8" and not gpu.float8:
        why = f"{gpu.name} has no float8 products, which need compute capability 8.9."
        raise ConfigError(Problem('precision = "fp8"', why, "Set precision: bf16, or give --gpu H100 or H200."))


def _name(gpu: Gpu) -> str:
    return f"{gpu.name} with {gpu.memory:g} GiB"


def _assumptions(config: Config, gpu: Gpu, vocab_size: int, words: dict[str, Any]) -> Any:
    divisor, tensor_parallel_size = config.model.make_vocab_size_divisible_by, config.parallel.model_parallel_size
    padded = padded_vocab_size(vocab_size, divisor, tensor_parallel_size)
    return assume(gpu, num_parameters(config.model, padded), words["mfu"], words["node"])


def _sections(
    planner: Planner, now: Plan, limit: float, ways: list[Change], best: list[Plan], searched: bool
) -> list[str]:
    lines = ["", "Memory of a GPU, GiB", *report.memory_table(now)]
    reserve = f"{planner.reserve / GIBIBYTE:g} for CUDA and NCCL"
    lines += [f"  peak: weights to gradients, {reserve}, and the larger of the update and what stands before it"]
    lines += [report.verdict(now, limit)]
    lines += ["", "Sent by the busiest GPU in one step", *report.traffic_lines(now)]
    lines += ["", "Time", *report.speed_lines(planner.config, now, planner.assumptions)]
    rates = report.rate_lines(planner.config)
    lines += ["", *rates] if rates else []
    if searched:
        title = "Fastest layouts that fit, with the same global batch" if best else "No layout fits on these GPUs."
        lines += ["", title, *(report.ranking(best) if best else [])]
        if best:
            keys = best[0].layout.settings(now.layout)
            lines += ["", f"For the first: --set {' '.join(f'{key}={_word(value)}' for key, value in keys.items())}"]
    elif now.peak > limit:
        title = "Cheapest changes that make it fit" if ways else "No three changes make it fit; try --search."
        lines += ["", title, *report.change_lines(ways)]
    return lines


def _word(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _data(
    config: Config, planner: Planner, now: Plan, limit: float, ways: list[Change], best: list[Plan]
) -> dict[str, Any]:
    assumptions = planner.assumptions
    return {
        **report.as_data(now, limit),
        "assumptions": {"gpu": assumptions.gpu.name, "mfu": assumptions.mfu, "source": assumptions.source},
        "learning_rate": report.rates(config),
        "changes": [
            {"settings": way.settings, "cost": way.cost, "peak_bytes": way.plan.peak, "step": way.plan.speed.step}
            for way in ways
        ],
        "layouts": [report.as_data(plan, limit) for plan in best],
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}."
        raise ConfigError(Problem(f"--json {path}", why, "Name a file in a folder that exists.")) from None
