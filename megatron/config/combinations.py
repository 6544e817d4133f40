"""What combines with what: one literal table, from which the errors and the table of docs/parallelism.md are made.

A Use is something a config can ask for by one key. All uses combine, except where a Line says that two of them do
not (or that one does not stand alone), why, and what to write instead. A Note says what a combination that
is allowed means. Whoever makes a combination work, or finds that one cannot, changes a line here and nothing else.

    for refusal in refusals(values): ...        # values: the flat keys of a config
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.engine import DECIDING, is_local


@dataclass(frozen=True)
class Use:
    """Something a config can ask for. key: dotted for an entry of a block. asks: whether a value of the key does;
    the value is None where a block lacks the entry. means: its description in the documentation."""

    key: str
    asks: Callable[[Any], bool]
    means: str


@dataclass(frozen=True)
class Line:
    """Two uses that do not go together; `other` is "" where `use` does not stand at all.

    key of `use` = value: it does not go with (key of `other` = value): `why`. `fix`
    built: False where it could be, and is not in this version: such a config can be checked and planned, not started.
    sharded: True where they do go together on one replica, of which `engine: auto` has the library's own engine.
    """

    use: str
    other: str
    why: str
    fix: str
    built: bool = True
    sharded: bool = False


@dataclass(frozen=True)
class Note:
    """Two uses that go together in a way worth saying."""

    use: str
    other: str
    text: str


@dataclass(frozen=True)
class Refusal:
    """A line that a config breaks. key, value: what to blame."""

    key: str
    value: Any
    why: str
    fix: str


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def _more_than_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _positive(value: Any) -> bool:
    return isinstance(value, float) and value > 0


_STAGE = "zero_optimization.stage"

USES: dict[str, Use] = {
    "ZeRO 0": Use(_STAGE, _is(0, None), "nothing is sharded over the data axis; our own engine"),
    "ZeRO 1": Use(_STAGE, _is(1), "optimizer states are sharded over the data axis; DeepSpeed"),
    "ZeRO 2": Use(_STAGE, _is(2), "gradients too; DeepSpeed"),
    "ZeRO 3": Use(_STAGE, _is(3), "parameters too; DeepSpeed"),
    "pipeline": Use("pipe_parallel_size", _more_than_one, "layers are divided into stages; DeepSpeed's pipeline"),
    "tensor": Use("model_parallel_size", _more_than_one, "each layer's matrices are divided"),
    "sequence": Use("sequence_parallel", _is(True), "norms and dropout are divided along the sequence"),
    "context": Use("context_parallel_size", _more_than_one, "each sequence is divided"),
    "attention dropout": Use("attention_dropout", _positive, "some attention probabilities are dropped"),
    "rpe": Use("pos_emb", _is("rpe"), "learned biases of relative positions"),
    "fp32": Use("precision", _is("fp32"), "everything in fp32"),
    "bf16": Use("precision", _is("bf16"), "fp32 masters, accumulation and reduction"),
    "fp16": Use("precision", _is("fp16"), "the same, with a loss scale"),
    "fp8": Use("precision", _is("fp8"), "bf16, in which the blocks' linear layers multiply in float8"),
    "optimizer offload": Use(
        "zero_optimization.offload_optimizer.device", _is("cpu"), "optimizer states and masters in CPU memory"
    ),
    "parameter offload": Use(
        "zero_optimization.offload_param.device", _is("cpu"), "parameters in CPU memory while they are not needed"
    ),
    "no offload": Use("zero_optimization.offload_optimizer.device", _is("none", None), "optimizer states on the GPU"),
    "optimizer on disk": Use("zero_optimization.offload_optimizer.device", _is("nvme"), "optimizer states on a disk"),
    "parameters on disk": Use("zero_optimization.offload_param.device", _is("nvme"), "parameters on a disk"),
    "sm3": Use("optimizer.type", _is("sm3"), "the optimizer that needs whole tensors"),
    "cpu_adam": Use("optimizer.type", _is("cpu_adam"), "DeepSpeed's Adam for CPU memory; it compiles at first use"),
    "update in backward": Use("optimizer_in_backward", _is(True), "each weight is updated when its gradient is there"),
    "round robin": Use("zero_optimization.round_robin_gradients", _is(True), "another order of gradients over ranks"),
    "DeepSpeed's bf16 states": Use("bf16.bf16_optimizer_states", _is(True), "moments and masters in bf16"),
    "bf16 masters": Use("bf16.bf16_master_weights_and_grads", _is(True), "masters and gradients in bf16"),
    "spike guard": Use(
        "spike_guard.action", _is("skip", "rollback", "stop"), "a step whose loss or gradient norm jumps is left out"
    ),
    "no norm": Use("zero_optimization.compute_grad_norm", _is(False), "no gradient norm"),
}

# The uses that the documentation crosses with one another.
SHOWN = (
    "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "pipeline", "tensor", "sequence", "context",
    "attention dropout", "rpe", "fp32", "bf16", "fp16", "fp8",
    "optimizer offload", "parameter offload", "sm3", "cpu_adam", "update in backward", "spike guard",
)  # fmt: skip

_ON_DISK = "checkpoints cannot read state from there."
_UPDATES_LATER = "DeepSpeed updates weights when all gradients are reduced."
_WHOLE = "it needs whole tensors, and {} gives it parts of them."

LINES: tuple[Line, ...] = (
    Line("ZeRO 2", "pipeline", "DeepSpeed cannot shard gradients over a pipeline.",
         "Set zero_optimization.stage to 1, or pipe_parallel_size to 1."),
    Line("ZeRO 3", "pipeline", "DeepSpeed cannot shard gradients and parameters over a pipeline.",
         "Set zero_optimization.stage to 1, or pipe_parallel_size to 1."),
    Line("optimizer offload", "ZeRO 0", "stage 0 keeps the optimizer on the GPU.",
         "Set zero_optimization.stage to 1, 2 or 3."),
    *(Line("parameter offload", f"ZeRO {stage}", "only stage 3 shards parameters, which is what can be offloaded.",
           "Set zero_optimization.stage to 3, or remove offload_param.") for stage in range(3)),
    Line("cpu_adam", "no offload", "it updates masters in CPU memory, and nothing is offloaded there.",
         'Set optimizer.type to "adam", or add "offload_optimizer": {"device": "cpu"} to zero_optimization.'),
    *(Line("sm3", f"ZeRO {stage}", _WHOLE.format("ZeRO on several replicas"), "Set zero_optimization.stage to 0.",
           sharded=True) for stage in (1, 2, 3)),
    Line("sm3", "pipeline", _WHOLE.format("the ZeRO 1 of a pipeline"), "Set pipe_parallel_size to 1."),
    Line("sm3", "tensor", _WHOLE.format("tensor parallelism"), "Set model_parallel_size to 1."),
    *(Line("update in backward", f"ZeRO {stage}", _UPDATES_LATER, "Set zero_optimization.stage to 0.", sharded=True)
      for stage in (1, 2, 3)),
    Line("update in backward", "pipeline", _UPDATES_LATER, "Set pipe_parallel_size to 1."),
    Line("update in backward", "fp16", "a step whose gradient overflows is skipped, and weights have changed by then.",
         "Set precision: bf16."),
    Line("spike guard", "update in backward", "weights have changed by the time that the loss's gradient is known.",
         "Remove spike_guard, or set optimizer_in_backward: false."),
    Line("optimizer on disk", "", _ON_DISK, 'Set it to "cpu" or "none".'),
    Line("parameters on disk", "", _ON_DISK, 'Set it to "cpu" or "none".'),
    Line("round robin", "", "DeepSpeed 0.19.8 hands over wrong masters under it, and checkpoints would hold them.",
         "Remove the entry."),
    Line("DeepSpeed's bf16 states", "", "DeepSpeed keeps the masters in bf16 under it, which lose small updates.",
         "Set moments_dtype: bf16, whose masters are fp32, and remove the entry."),
    Line("bf16 masters", "", "masters in bf16 lose small updates, and are always fp32 here.", "Remove the entry."),
    Line("no norm", "", "the norm is reported at every step, and tells a gradient that is not finite.",
         "Remove the entry."),
)  # fmt: skip

NOTES: tuple[Note, ...] = (
    *(Note("context", use, "needs context_parallel_method: all_to_all") for use in ("attention dropout", "rpe")),
    Note("ZeRO 0", "pipeline", "served by ZeRO 1, whose arithmetic is the same"),
)  # fmt: skip


def value_of(values: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, dotted for an entry of a block; None where a block lacks the entry.

    Raises KeyError for a key that is not there at all."""
    top, *path = key.split(".")
    value = values[top]
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def refusals(values: Mapping[str, Any], wrong: Container[str] = (), built: bool = True) -> Iterator[Refusal]:
    """Yield the lines that a config breaks.

    values: flat keys. wrong: keys that are known to be wrong; a line that depends on one says nothing.
    built: True for what can never run, False for what this version does not run yet.
    """
    for line in LINES:
        if line.built is built and _is_broken(line, values, wrong) and not (line.sharded and _is_ours(values, wrong)):
            use, value = USES[line.use], value_of(values, USES[line.use].key)
            yield Refusal(use.key, value, _reason(line, values), line.fix)


def can_stand(*names: str) -> bool:
    """Return whether some config uses all of `names`: there are values of the other keys that break no line."""
    taken = {USES[name].key for name in names}
    free = {use.key for use in USES.values() if use.asks(None)} - taken
    choices = [[name for name, use in USES.items() if use.key == key] for key in sorted(free)]
    return any(_stands({*names, *chosen}) for chosen in itertools.product(*choices))


def _stands(names: set[str]) -> bool:
    return not any({line.use, line.other or line.use} <= names for line in LINES if line.built)


def _is_broken(line: Line, values: Mapping[str, Any], wrong: Container[str]) -> bool:
    for name in filter(None, (line.use, line.other)):
        top = USES[name].key.partition(".")[0]
        if top in wrong or top not in values or not USES[name].asks(value_of(values, USES[name].key)):
            return False
    return True


def _is_ours(values: Mapping[str, Any], wrong: Container[str]) -> bool:
    """Return whether the library's own engine, which holds whole tensors, trains the config, at any ZeRO stage."""
    return all(key in values and key not in wrong for key in DECIDING) and is_local(values)


def _reason(line: Line, values: Mapping[str, Any]) -> str:
    if not line.other:
        return line.why
    key = USES[line.other].key
    value = value_of(values, key)
    shown = "unset" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"it does not go with {key} = {shown}: {line.why}"
