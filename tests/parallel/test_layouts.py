"""The matrix: every layout trains the model that one process trains.

Each row of TABLE is one run of 5 steps and an evaluation, compared with one process: losses, grad norms before and
after clipping, the unclipped gradient of every parameter, final weights, evaluation; relative 1e-5 in fp32. What a row
holds beside its layout is spread so that every pair of settings stands somewhere, which the tests at the end check.
Other precisions, models and methods are in the files of each axis.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest

from tests.parallel.matrix import assert_equal, run_layout, run_reference

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"pos_emb": "learned", "no_weight_tying": False},
    "parallel": {"gpt_j_residual": True, "rotary_pct": 0.5},
    "grouped": {"norm": "rmsnorm", "activation": "swiglu", "intermediate_size": 96, "num_kv_heads": 2},
    "all": {"no_weight_tying": False, "gpt_j_residual": True, "num_kv_heads": 2},  # tied, parallel and grouped
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "-": {},
    "full": {"checkpoint_activations": True},
    "select": {"checkpoint_activations": True, "checkpoint_operations": ["attention", "activation"]},
}


class Row(NamedTuple):
    """tp, pp, dp, cp: sizes of the tensor, pipeline, data and context axes. sp: sequence parallelism. zero: stage.
    steps: accumulation. model, recompute: of the tables above."""

    tp: int
    pp: int
    dp: int
    cp: int
    sp: bool
    zero: int
    steps: int
    model: str
    recompute: str


SP, NO = True, False
TABLE = [
    #  tp pp dp cp sp zero steps model recompute
    Row(1, 1, 1, 1, NO, 0, 4, "tied", "-"),
    Row(1, 1, 2, 1, NO, 0, 1, "tied", "full"),
    Row(1, 1, 2, 1, NO, 1, 4, "grouped", "select"),
    Row(1, 1, 2, 1, NO, 2, 1, "all", "full"),
    Row(1, 1, 2, 1, NO, 3, 4, "parallel", "-"),
    Row(2, 1, 1, 1, NO, 0, 4, "parallel", "select"),
    Row(2, 1, 1, 1, SP, 1, 1, "tied", "-"),
    Row(2, 1, 2, 1, NO, 0, 1, "all", "-"),
    Row(2, 1, 2, 1, NO, 1, 4, "tied", "full"),
    Row(2, 1, 2, 1, NO, 2, 4, "grouped", "-"),
    Row(2, 1, 2, 1, NO, 3, 1, "parallel", "full"),
    Row(2, 1, 2, 1, SP, 0, 4, "grouped", "full"),
    Row(2, 1, 2, 1, SP, 1, 1, "parallel", "select"),
    Row(2, 1, 2, 1, SP, 2, 1, "tied", "select"),
    Row(2, 1, 2, 1, SP, 3, 4, "all", "-"),
    Row(1, 2, 1, 1, NO, 0, 4, "grouped", "-"),
    Row(1, 2, 1, 1, NO, 1, 1, "tied", "select"),
    Row(1, 2, 2, 1, NO, 0, 1, "parallel", "-"),
    Row(1, 2, 2, 1, NO, 1, 4, "all", "full"),
    Row(2, 2, 1, 1, NO, 1, 1, "grouped", "full"),
    Row(2, 2, 1, 1, SP, 1, 4, "tied", "-"),
    Row(2, 2, 2, 1, NO, 0, 1, "parallel", "full"),
    Row(2, 2, 2, 1, NO, 1, 4, "tied", "select"),
    Row(2, 2, 2, 1, SP, 0, 4, "grouped", "select"),
    Row(2, 2, 2, 1, SP, 1, 1, "all", "-"),
    Row(1, 1, 1, 2, NO, 0, 4, "tied", "full"),
    Row(1, 1, 1, 2, NO, 3, 1, "parallel", "select"),
    Row(1, 1, 2, 2, NO, 1, 1, "all", "-"),
    Row(1, 1, 2, 2, NO, 2, 4, "grouped", "full"),
    Row(2, 1, 1, 2, NO, 0, 1, "tied", "select"),
    Row(2, 1, 1, 2, SP, 1, 4, "parallel", "-"),
    Row(1, 2, 1, 2, NO, 1, 4, "all", "select"),
    Row(2, 2, 1, 2, SP, 0, 4, "grouped", "-"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(map(str, row)))
def test_a_layout_trains_as_one_process_does(row: Row) -> None:
    layout = {
        "model_parallel_size": row.tp,
        "pipe_parallel_size": row.pp,
        "context_parallel_size": row.cp,
        "sequence_parallel": row.sp,
        "stage": row.zero,
        "gradient_accumulation_steps": row.steps,
        **RECOMPUTE[row.recompute],
    }
    trace = run_layout({**MODELS[row.model], **layout}, row.tp * row.pp * row.dp * row.cp)
    assert_equal(trace, run_reference(MODELS[row.model]), 1e-5)


def stands(**fields: Any) -> bool:
    return any(all(getattr(row, name) == value for name, value in fields.items()) for row in TABLE)


def test_the_table_holds_every_layout_that_the_rules_allow() -> None:
    for tp, pp, dp in itertools.product((1, 2), repeat=3):
        for sp in (NO, SP)[:tp]:
            assert stands(tp=tp, pp=pp, dp=dp, cp=1, sp=sp) or (tp, pp, dp, sp) == (1, 1, 1, NO), (tp, pp, dp, sp)
            for zero in (0, 1) if pp == 2 else (0, 1, 2, 3):
                assert dp == 1 or stands(tp=tp, pp=pp, dp=dp, sp=sp, zero=zero), (tp, pp, dp, sp, zero)
    for axis in ({"tp": 2, "sp": NO}, {"tp": 2, "sp": SP}, {"pp": 2}, *({"zero": zero} for zero in range(4))):
        assert stands(cp=2, **axis), axis


def test_every_pair_of_settings_stands_somewhere() -> None:
    axes = [("tp", 2), ("pp", 2), ("dp", 2), ("cp", 2), ("sp", SP), *(("zero", zero) for zero in range(4))]
    settings = [*(("steps", steps) for steps in (1, 4)), *(("recompute", name) for name in RECOMPUTE)]
    for axis, setting in itertools.product(axes, [*settings, *(("model", name) for name in MODELS)]):
        if axis not in [("zero", 2), ("zero", 3)] or setting[0] != "model":
            assert stands(**dict([axis, setting])), (axis, setting)
    for model, setting in itertools.product(MODELS, settings):
        assert stands(model=model, **dict([setting])), (model, setting)
    for steps, name in itertools.product((1, 4), RECOMPUTE):
        assert stands(steps=steps, recompute=name), (steps, name)
