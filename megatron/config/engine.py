"""Which engine trains a config, from the config alone: the library's own, or DeepSpeed's.

Ours holds everything whole and never waits for the device; DeepSpeed's shard, offload and run pipelines. Their
arithmetic is the same, and so are their checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.draft import Draft
from megatron.config.schema.config import Config
from megatron.errors import Problem

DECIDING = (
    "engine", "zero_optimization", "world_size", "model_parallel_size", "pipe_parallel_size", "data_types",
    "communication_data_type", "flops_profiler", "comms_logger", "deepspeed_extra_args",
)  # fmt: skip
"""The keys that decide which engine trains a config."""

_OFFLOADS = ("offload_optimizer", "offload_param")
_ASKS_DEEPSPEED = ("flops_profiler", "comms_logger")


@dataclass(frozen=True)
class EngineChoice:
    """is_local: the library's own engine. stage: the ZeRO stage that serves the config's. why: in words."""

    is_local: bool
    stage: int
    why: str


def choose_engine(config: Config) -> EngineChoice:
    """Return what trains a config."""
    values = config.flat()
    asked, stage = values["engine"], _stage(values)
    if is_local(values):
        return EngineChoice(True, 0, _why_local(asked, stage))
    why = "engine: deepspeed asks for it" if asked == "deepspeed" else next(_reasons(values))
    served = "" if stage else "; stage 0 is served by stage 1, whose arithmetic is the same"
    return EngineChoice(False, max(1, stage), why + served)


def is_local(values: Mapping[str, Any]) -> bool:
    """Return whether the library's own engine trains a config, given as the values of its keys."""
    return values["engine"] == "local" or (values["engine"] == "auto" and not any(_reasons(values)))


def without_deepspeed(config: Config) -> str:
    """Return what to set so that the library's own engine trains a config, in words: "set a: b and c: d"."""
    values = config.flat()
    changes = ["engine: auto"] if values["engine"] == "deepspeed" else []
    if values["pipe_parallel_size"] > 1:
        changes.append("pipe_parallel_size: 1")
    offloads = [entry for entry in _OFFLOADS if _offload(values, entry) != "none"]
    if _stage(values) and any(_reasons({**values, "pipe_parallel_size": 1})):
        changes.append("zero_optimization.stage: 0")
    return f"set {' and '.join(changes)}{''.join(f', without zero_optimization.{entry}' for entry in offloads)}"


def _reasons(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield why `auto` takes DeepSpeed; what stage 0 says to DeepSpeed is no reason."""
    yield from _needs_deepspeed(values)
    if _stage(values):
        yield from _asks_deepspeed(values)


def _values(d: Draft) -> dict[str, Any]:
    """Return the values of the keys that decide; raises UnavailableError where one of them is wrong."""
    return {key: getattr(d, key) for key in DECIDING}


def engine_can_run(d: Draft) -> Iterator[Problem]:
    """An engine that is asked for by name can do what the config needs."""
    values = _values(d)
    if d.engine == "local":
        for reason in (*_needs_deepspeed(values), *(_asks_deepspeed(values) if _stage(values) else ())):
            fix = "Set engine: auto, which takes DeepSpeed's where it is needed"
            yield d.problem("engine", d.engine, f"{reason}.", f"{fix}{'' if _stage(values) == 0 else _OR_STAGE}.")
    if d.cuda_graphs is True and not is_local(values):
        why = "DeepSpeed's engine trains this config, and only the library's own records graphs."
        reason = next(_reasons(values), "engine: deepspeed asks for it")
        yield d.problem("cuda_graphs", True, f"{why[:-1]}: {reason}.", "Set cuda_graphs: auto.")
    if d.engine == "deepspeed" and d.optimizer["type"] == "sm3":
        why = "optimizer sm3 needs whole tensors, and DeepSpeed gives it parts of them."
        yield d.problem(
            "engine", d.engine, why, "Set engine: auto, and zero_optimization.stage: 0 on several replicas."
        )


_OR_STAGE = ", or zero_optimization.stage: 0"


def _why_local(asked: str, stage: int) -> str:
    if asked == "local":
        return "engine: local asks for it"
    if stage == 0:
        return "ZeRO stage 0 shards nothing"
    return f"on one replica ZeRO stage {stage} has nothing to shard, and the arithmetic is the same"


def _needs_deepspeed(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what only DeepSpeed's engines can do for a config."""
    if values["pipe_parallel_size"] > 1:
        yield f"pipe_parallel_size = {values['pipe_parallel_size']} is DeepSpeed's pipeline"
    stage = _stage(values)
    replicas = values["world_size"] // (values["model_parallel_size"] * max(1, values["pipe_parallel_size"]))
    if stage and replicas > 1:
        yield f"ZeRO stage {stage} shards over {replicas} replicas"
    for entry in _OFFLOADS:
        if _offload(values, entry) != "none":
            yield f"zero_optimization.{entry}.device = {_offload(values, entry)} is DeepSpeed's"


def _asks_deepspeed(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config says to DeepSpeed that our engine does not hear."""
    types = values["data_types"] or {}
    sums = {"communication_data_type": values["communication_data_type"], **types}
    yield from (f"{name} = {kind} is DeepSpeed's" for name, kind in sums.items() if kind not in (None, "fp32"))
    yield from (f"{key} is DeepSpeed's" for key in _ASKS_DEEPSPEED if (values[key] or {}).get("enabled"))
    if values["deepspeed_extra_args"]:
        yield "deepspeed_extra_args are for DeepSpeed"


def _offload(values: Mapping[str, Any], entry: str) -> str:
    return str((values["zero_optimization"].get(entry) or {}).get("device", "none"))


def _stage(values: Mapping[str, Any]) -> int:
    return int(values["zero_optimization"].get("stage", 0))
