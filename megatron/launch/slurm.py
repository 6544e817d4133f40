"""What Slurm says of a job in its variables: which nodes it has, and how many tasks or GPUs each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron.launch.hosts import Host

_LAST_STEP = 0xFFFFFFF0  # beyond it are a batch script, and the shell that salloc opens


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process as a task of a step; a script or a shell in a job is none."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _LAST_STEP


def of_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a task with the sizes of its own step: those of the job may be others."""
    own = dict(environ)
    if is_task(environ) and environ.get("SLURM_STEP_NUM_TASKS"):
        own["SLURM_NTASKS"] = environ["SLURM_STEP_NUM_TASKS"]
        sizes, node = counts(environ.get("SLURM_STEP_TASKS_PER_NODE", "")), environ.get("SLURM_NODEID", "")
        if node.isdigit() and int(node) < len(sizes):
            own["SLURM_NTASKS_PER_NODE"] = str(sizes[int(node)])
    return own


def node_names(text: str) -> list[str]:
    """Return the nodes of Slurm's short form: `n[07-09,12],m1` -> n07, n08, n09, n12, m1."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = re.split(r"\[([^\]]*)\]", part)
        expanded = [pieces[0]]
        for inside, after in zip(pieces[1::2], pieces[2::2], strict=True):
            expanded = [name + number + after for name in expanded for number in _numbers(inside)]
        names += expanded
    return names


def _numbers(text: str) -> list[str]:
    """Return the numbers of `07-09,12`, as wide as they are written."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        width = len(first)
        found += [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)] if last else [first]
    return found


def counts(text: str) -> list[int]:
    """Return the numbers that Slurm gives for each node in turn: `2(x3),1` -> 2, 2, 2, 1."""
    return [int(match[1]) for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(match[2] or 1))]


def allocated_hosts(environ: Mapping[str, str]) -> list[Host]:
    """Return the nodes of the job that this process runs in; empty outside of one.

    Their slots are the tasks that were asked for with --ntasks-per-node or --ntasks, else their GPUs, else one."""
    text = environ.get("SLURM_JOB_NODELIST")
    if not text:
        return []
    names = node_names(text)
    asked_tasks = "SLURM_NTASKS_PER_NODE" in environ or "SLURM_NTASKS" in environ
    if asked_tasks and environ.get("SLURM_TASKS_PER_NODE"):
        sizes = counts(environ["SLURM_TASKS_PER_NODE"])
    else:
        sizes = counts(environ.get("SLURM_GPUS_ON_NODE", "1"))
    sizes = sizes if len(sizes) == len(names) else sizes[:1] * len(names)
    return [Host(name, tuple(range(size))) for name, size in zip(names, sizes, strict=True)]


def ranks_to_hosts(environ: Mapping[str, str]) -> list[str]:
    """Return the node of each rank of the job step that this process belongs to; empty where Slurm does not say it.

    Tasks are counted block by block, which is srun's default for as many tasks as there are slots."""
    text, sizes = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not text or not sizes or "cyclic" in environ.get("SLURM_DISTRIBUTION", ""):
        return []
    names, numbers = node_names(text), counts(sizes)
    return [name for name, size in zip(names, numbers, strict=False) for _ in range(size)]
