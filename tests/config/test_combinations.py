"""The table of combinations: every line is an error that names both keys, and the table stands in the documentation."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.config import combinations, keys, readiness
from megatron.config.combinations import LINES, NOTES, SHOWN, USES, Line
from megatron.config.resolve import resolve
from megatron.errors import ConfigError
from megatron.optim.build import KINDS
from tests.config.small import SMALL

ROOT = Path(__file__).resolve().parents[2]

ASKED: dict[str, dict[str, Any]] = {
    # what to write in a file, so that a config uses it
    **{f"ZeRO {stage}": {"zero_optimization.stage": stage} for stage in range(4)},
    "pipeline": {"pipe_parallel_size": 2},
    "tensor": {"model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "sequence": {"sequence_parallel": True},
    "attention dropout": {"attention_dropout": 0.1, "context_parallel_method": "all_to_all"},
    "rpe": {"pos_emb": "rpe", "context_parallel_method": "all_to_all"},
    **{kind: {"precision": kind} for kind in ("fp32", "bf16", "fp16", "fp8")},
    "optimizer offload": {"zero_optimization.offload_optimizer": {"device": "cpu"}},
    "parameter offload": {"zero_optimization.offload_param": {"device": "cpu"}},
    "no offload": {},
    "optimizer on disk": {"zero_optimization.offload_optimizer": {"device": "nvme"}},
    "parameters on disk": {"zero_optimization.offload_param": {"device": "nvme"}},
    "sm3": {"optimizer.type": "sm3", "weight_decay": 0.0},
    "cpu_adam": {"optimizer.type": "cpu_adam"},
    "update in backward": {"optimizer_in_backward": True, "gradient_clipping": 0.0},
    "round robin": {"zero_optimization.round_robin_gradients": True},
    "DeepSpeed's bf16 states": {"bf16": {"bf16_optimizer_states": True}},
    "bf16 masters": {"bf16": {"bf16_master_weights_and_grads": True}},
    "spike guard": {"spike_guard": {"action": "skip"}},
    "no norm": {"zero_optimization.compute_grad_norm": False},
}


def flat(*names: str) -> dict[str, Any]:
    """Return a config that uses some things, and otherwise what lets them stand where that is possible."""
    asked = {key: value for name in names for key, value in ASKED[name].items()}
    values: dict[str, Any] = {**SMALL, "zero_optimization": {}, "optimizer": {"params": {"lr": 1e-3}}}
    for key, value in asked.items():
        top, _, entry = key.partition(".")
        if entry:
            values[top] = {**values[top], entry: value}
        else:
            values[top] = value
    return values


def said(values: dict[str, Any]) -> list[str]:
    """Return the problems of a config that never runs, or that this version does not run."""
    try:
        config = resolve(values, world_size=4)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return [str(problem) for problem in readiness.runnable(config)]


def test_every_use_can_be_asked_for() -> None:
    assert ASKED.keys() == USES.keys()
    assert set(SHOWN) <= USES.keys()
    for name, use in USES.items():
        assert use.key.partition(".")[0] in keys.fields(), name
        assert use.asks(combinations.value_of({**resolve(SMALL).flat(), **flat(name)}, use.key)), name


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.use} x {line.other}")
def test_a_line_is_an_error_that_names_both_keys(line: Line) -> None:
    names = [name for name in (line.use, line.other) if name]
    problems = said(flat(*names))
    mine = [problem for problem in problems if problem.startswith(f"{USES[line.use].key} = ") and line.why in problem]
    assert len(mine) == 1, problems
    assert mine[0].endswith(line.fix)
    assert all(f"{USES[name].key} = " in mine[0] for name in names)


@pytest.mark.parametrize(("use", "other"), list(itertools.combinations(SHOWN, 2)))
def test_a_pair_stands_as_the_table_says(use: str, other: str) -> None:
    """It does with one ZeRO stage and with or without offload, or with none."""
    if USES[use].key == USES[other].key:
        return
    stages = [f"ZeRO {stage}" for stage in range(4)]
    variants = [(use, other, stage, offload) for stage in stages for offload in ("no offload", "optimizer offload")]
    stands = any(not refused(names) for names in variants if is_consistent(names))
    assert stands == combinations.can_stand(use, other)


def is_consistent(names: tuple[str, ...]) -> bool:
    """Return whether no key is asked for twice with different values."""
    return len({USES[name].key for name in {*names}}) == len({*names})


def refused(names: tuple[str, ...]) -> bool:
    try:
        resolve(flat(*names), world_size=4)
    except ConfigError:
        return True
    return False


def test_each_line_and_note_is_written_once() -> None:
    pairs = [frozenset((line.use, line.other)) for line in (*LINES, *NOTES)]
    assert len(pairs) == len(set(pairs))


def test_optimizers_of_whole_tensors_have_their_lines() -> None:
    for name, kind in KINDS.items():
        refused = {line.other for line in LINES if line.use == name}
        assert kind.elementwise or {"ZeRO 1", "ZeRO 2", "ZeRO 3", "pipeline", "tensor"} <= refused, name


def test_the_page_shows_every_line() -> None:
    text = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    for line in LINES:
        assert line.why in text
        assert line.fix in text
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.MULTILINE)
    assert tuple(rows) == SHOWN


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.sharded], ids=lambda line: f"{line.use} x {line.other}"
)
def test_what_ours_can_do_stands_on_one_replica(line: Line) -> None:
    values = flat(line.use, line.other)
    assert resolve(values, world_size=1).parallel.zero_optimization["stage"] > 0
    with pytest.raises(ConfigError):
        resolve({**values, "engine": "deepspeed"}, world_size=1)
    with pytest.raises(ConfigError, match=re.escape(line.why)):
        resolve(values, world_size=2)
