"""Flat keys -> Config, or every problem at once.

The steps, in order: classify the keys, bring values into canonical form, check the typed blocks, derive what
follows from the rest (precision, processes, batch), validate each section, apply the rules across sections.

    config = resolve({"num_layers": 12, "hidden_size": 768, ...}, world_size=8)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config import keys, rules
from megatron.config.batch import Contradiction, complete, processes
from megatron.config.blocks import BLOCKS, OPTIMIZERS, Block, OptimizerParams
from megatron.config.classify import classify
from megatron.config.draft import Draft, UnavailableError, either
from megatron.config.effects import without_effect
from megatron.config.precision import derive_precision
from megatron.config.schema.config import Config
from megatron.config.values import canonical_fields, parts, validate
from megatron.config.yaml_reader import Setting, canonical_key
from megatron.errors import ConfigError, Problem

_AXES = ("model", "pipe", "context")


@dataclass(frozen=True)
class Resolution:
    """A config, and what a person should know of how it came about (ignored keys, settings without effect)."""

    config: Config
    notices: tuple[str, ...]


def resolve(flat: Mapping[str, Any], world_size: int | None = None) -> Config:
    """Return the frozen Config of flat keys for a world of `world_size` processes.

    world_size: None takes the key world_size, so that `resolve(config.flat())` is the config again, or 1.
    Raises ConfigError with all problems at once."""
    settings = {canonical_key(key): Setting(value) for key, value in flat.items()}
    return resolve_settings(settings, world_size).config


def resolve_settings(
    settings: Mapping[str, Setting],
    world_size: int | None = None,
    planning: bool = False,
    problems: list[Problem] | None = None,
) -> Resolution:
    """Return the Config of located settings, with its notices.

    world_size: processes of the run; None takes the key world_size or 1. planning: nothing will run, so the config
    decides for how many processes it is resolved: global_num_gpus, or a whole batch triangle, or at least
    as many as one model takes. problems: what was found before, to be reported together.
    Raises ConfigError with all problems, in the order of their places.
    """
    draft = Draft(dict(settings), problems=list(problems or []))
    classify(draft)
    _take_auto(draft)
    _canonical_values(draft)
    _check_blocks(draft)
    derive_precision(draft)
    _fill_defaults(draft)
    _count_processes(draft, world_size, planning)
    _complete_batch(draft)
    sections = {name: _section(draft, name) for name in keys.sections()}
    for rule in rules.RULES:
        try:
            draft.problems.extend(rule(draft))
        except UnavailableError:
            continue
    if draft.problems:
        raise ConfigError(*_in_order(_without_model(draft)))
    draft.notices.extend(without_effect(draft))
    return Resolution(Config.model_validate(sections), tuple(draft.notices))


_MICRO, _FIND = "train_micro_batch_size_per_gpu", "find_micro_batch_size"


def _take_auto(draft: Draft) -> None:
    """Replace `train_micro_batch_size_per_gpu: auto` by the key that it stands for; note what contradicts either."""
    setting, find = draft.settings.get(_MICRO), draft.settings.get(_FIND)
    is_auto = setting is not None and isinstance(setting.value, str) and setting.value.lower() == "auto"
    if is_auto and find is not None and find.value is False:
        why = "train_micro_batch_size_per_gpu is auto, which asks for it."
        draft.problems.append(draft.problem(_FIND, False, why, f"Remove the key, or give {_MICRO} as a number."))
    elif not is_auto and (find is None or find.value is not True):
        return
    asked = "train_micro_batch_size_per_gpu is auto" if is_auto else "find_micro_batch_size is true"
    if setting is not None and is_auto:
        draft.settings[_MICRO] = Setting(None, setting.where)
        draft.settings[_FIND] = Setting(True, setting.where)
    elif draft.given(_MICRO):
        why = f"it is what is to be found, since {asked}."
        draft.refuse(_MICRO, draft.settings[_MICRO].value, why, "Remove one of the two keys.")
    if draft.given("gradient_accumulation_steps"):
        why = f"it follows from the micro-batch that is found, and {asked}."
        steps = draft.settings["gradient_accumulation_steps"].value
        draft.problems.append(draft.problem("gradient_accumulation_steps", steps, why, "Remove the key."))
        del draft.settings["gradient_accumulation_steps"]


def _canonical_values(draft: Draft) -> None:
    for section in keys.sections().values():
        given = {key: draft.settings[key].value for key in section.model_fields if key in draft.settings}
        draft.values.update(canonical_fields(section, given))


def _canonical_block(model: type[Block], value: dict[str, Any]) -> dict[str, Any]:
    """Return a block's entries in canonical form, blocks within it included."""
    result = canonical_fields(model, value)
    for name, child in result.items():
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        for part in parts(annotation):
            if isinstance(part, type) and issubclass(part, Block) and isinstance(child, dict):
                result[name] = _canonical_block(part, child)
    return result


def _check_blocks(draft: Draft) -> None:
    """Replace each block's value by its entries in canonical form, and note the entries that are wrong."""
    for key, model in BLOCKS.items():
        value = draft.values.get(key)
        if not isinstance(value, dict) or key not in draft.settings:
            continue
        entries = _canonical_block(model, value)
        if key == "optimizer":
            _refuse_foreign_params(draft, entries)
        block = validate(draft, model, entries, prefix=f"{key}.")
        if isinstance(block, Block):
            draft.values[key] = block.given()
    zero = draft.values.get("zero_optimization", {})
    if isinstance(zero, dict):
        offload = {"offload_optimizer": {"device": "cpu"}} if zero.get("cpu_offload") else {}
        kept = {key: value for key, value in zero.items() if key != "cpu_offload"}
        draft.values["zero_optimization"] = {"stage": 0, **offload, **kept}
    _complete_optimizer(draft)


def _refuse_foreign_params(draft: Draft, entries: dict[str, Any]) -> None:
    """Take the parameters of other optimizers out of the block, so that nothing is said about their values."""
    kind, params = entries.get("type", "adam"), entries.get("params")
    takes = OPTIMIZERS.get(kind) if isinstance(kind, str) else None
    if takes is None or not isinstance(params, dict):
        return
    names = ["lr", *sorted(takes)]
    foreign = set(params) & set(OptimizerParams.model_fields) - {"weight_decay", *names}
    for name in sorted(foreign):
        near = keys.near_names(name, names)
        fix = f"{near or 'Remove it;'} {kind} takes {either(names)}."
        draft.refuse(f"optimizer.params.{name}", params[name], f"optimizer {kind} does not take it.", fix)
    entries["params"] = {name: value for name, value in params.items() if name not in foreign}


def _complete_optimizer(draft: Draft) -> None:
    """Write out the betas and epsilon of Adam, and move a decay inside the block to its own key."""
    block = draft.values.get("optimizer")
    if not isinstance(block, dict) or "optimizer" in draft.wrong:
        return
    kind, params = block.get("type", "adam"), dict(block["params"])
    decay = params.pop("weight_decay", None)
    if decay is not None and not draft.given("weight_decay"):
        draft.values["weight_decay"] = decay
    elif decay is not None and decay != draft.settings["weight_decay"].value:
        why = f"weight_decay = {draft.settings['weight_decay'].value} says otherwise."
        draft.refuse("optimizer.params.weight_decay", decay, why, "Keep the key weight_decay alone.")
    if "adam" in kind:
        params = {"lr": params["lr"], "betas": [0.9, 0.999], "eps": 1e-8, **params}
    draft.values["optimizer"] = {"type": kind, "params": params}


def _fill_defaults(draft: Draft) -> None:
    for key, (_, info) in keys.fields().items():
        if key not in draft.values and not info.is_required():
            draft.values[key] = info.get_default(call_default_factory=True)


def _positive(draft: Draft, key: str) -> int | None:
    """Return a positive whole number, None where it is unset; raises UnavailableError where it is something else."""
    value = draft.values.get(key)
    if value is None:
        return None
    if key in draft.wrong or not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnavailableError(key)
    return value


def _count_processes(draft: Draft, world_size: int | None, planning: bool) -> None:
    """Set world_size; note what contradicts it."""
    planned = draft.settings.get(keys.PLANNING, Setting(None)).value
    if planned is not None and (not isinstance(planned, int) or isinstance(planned, bool) or planned < 1):
        draft.refuse(keys.PLANNING, planned, "it must be a whole number of GPUs.", f"Write {keys.PLANNING}: 8")
        planned = None
    stored = draft.settings.pop("world_size", Setting(None)).value
    stored = stored if isinstance(stored, int) and stored > 0 else None
    try:
        per_model = _processes_per_model(draft)
        if planning:
            count = planned or _processes_of_batch(draft, per_model) or max(world_size or stored or 1, per_model)
            if count != (world_size or 1):
                draft.notices.append(f"Planned for {count} {processes(count)}; this machine offers {world_size or 1}.")
        else:
            count = world_size or stored or planned or 1
            if planned and planned != count:
                draft.refuse(
                    keys.PLANNING, planned, f"the launcher starts {count} {processes(count)}.", "Remove the key."
                )
        draft.values["world_size"] = count
        if count % per_model:
            _refuse_division(draft, count, per_model)
    except (UnavailableError, TypeError):
        draft.values["world_size"] = world_size or 1
        draft.wrong.add("world_size")


def _processes_per_model(draft: Draft) -> int:
    """Return the processes that together compute one sequence, which the data parallel size does not count."""
    tp, cp = (_positive(draft, f"{axis}_parallel_size") or 1 for axis in ("model", "context"))
    return tp * cp * max(1, draft.pipe_parallel_size)


def _refuse_division(draft: Draft, count: int, per_model: int) -> None:
    """Note that the processes cannot be divided, under the first key that asks for more than one."""
    sizes = {f"{axis}_parallel_size": max(1, draft.values[f"{axis}_parallel_size"]) for axis in _AXES}
    first, *others = sorted((key for key in sizes if sizes[key] > 1), key=list(sizes).index)
    product = " x ".join([str(sizes[first]), *(f"{key} ({sizes[key]})" for key in others)])
    why = f"{count} {processes(count)} cannot be divided into groups of {product}{f' = {per_model}' if others else ''}."
    fix = f"Start a multiple of {per_model} processes, or set {'these sizes' if others else 'it'} to 1."
    draft.refuse(first, sizes[first], why, fix)


def _processes_of_batch(draft: Draft, per_model: int) -> int | None:
    """Return the processes that a whole batch triangle implies; None where it is not whole."""
    train, micro, steps = (_positive(draft, key) for key in rules.TRIANGLE)
    if not (train and micro and steps) or train % (micro * steps):
        return None
    return train // (micro * steps) * per_model


def _complete_batch(draft: Draft) -> None:
    try:
        train, micro, accumulation = (_positive(draft, key) for key in rules.TRIANGLE)
        if draft.values.get(_FIND) is True and micro is None:
            if train is None:
                why = "the largest that fits keeps train_batch_size, which is not set."
                key, value = (_MICRO, "auto") if _MICRO in draft.settings else (_FIND, True)
                draft.problems.append(draft.problem(key, value, why, "Set train_batch_size: 256, for example."))
            micro = 1  # until the run finds it
        result = complete(train, micro, accumulation, draft.world_size // _processes_per_model(draft))
    except (UnavailableError, TypeError, ZeroDivisionError):
        for key in rules.TRIANGLE:
            draft.values.setdefault(key, 1)
        draft.wrong.update(key for key in rules.TRIANGLE if key not in draft.settings)
        return
    if isinstance(result, Contradiction):
        draft.refuse(result.key, draft.values[result.key], result.why, result.fix)
        for key in rules.TRIANGLE:
            draft.values.setdefault(key, 1)
        return
    draft.values.update({key: getattr(result, key) for key in rules.TRIANGLE})


def _section(draft: Draft, name: str) -> Any:
    model = keys.sections()[name]
    values = {key: draft.values[key] for key in model.model_fields if key in draft.values and key not in draft.wrong}
    already = {key for key in model.model_fields if key in draft.wrong and model.model_fields[key].is_required()}
    values |= dict.fromkeys(already, 1)  # reported before; 1 is valid for every required key
    return validate(draft, model, values)


def _without_model(draft: Draft) -> list[Problem]:
    """Return the draft's problems, with one in the place of five where no file describes a model."""
    required = [key for key, (_, info) in keys.fields().items() if info.is_required() and key not in rules.TRIANGLE]
    if any(key in draft.settings for key in required):
        return draft.problems
    why = "no file describes a model."
    missing = Problem(", ".join(required), why, "Give a model's file as well, such as configs/125M.yml.")
    return [missing, *(problem for problem in draft.problems if problem.what not in required)]


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Return problems by file and line; those without a place last."""

    def place(problem: Problem) -> tuple[bool, str, int]:
        file, _, line = problem.where.rpartition(":")
        return (not problem.where, file, int(line)) if line.isdigit() else (not problem.where, problem.where, 0)

    return sorted(dict.fromkeys(problems), key=place)
