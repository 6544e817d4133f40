"""Another turn of the same Slurm job: `scontrol requeue`, and what it answered."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

SECONDS = 60.0


def requeue(environ: Mapping[str, str], seconds: float = SECONDS) -> str:
    """Put the Slurm job of this environment back into the queue; return in a sentence what came of it.

    Nothing is raised: the checkpoint is there, and whoever reads the sentence can submit the job again. seconds: how
    long scontrol may take. Slurm ends a job that it requeues, so this is to be the last act of a run."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return "It is not requeued: slurm_requeue is set, but SLURM_JOB_ID is not, so this is no Slurm job."
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    command = shutil.which("scontrol", path=environ.get("PATH"))
    if command is None:
        return f"Job {job} is not requeued: there is no scontrol on this machine."
    try:
        done = subprocess.run([command, "requeue", job], capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Job {job} is not requeued: scontrol gave no answer ({error})."
    answer = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        return f"Job {job} is not requeued, scontrol answered: {answer or f'exit code {done.returncode}'}."
    return f"Job {job} is requeued{f' ({answer})' if answer else ''}."
