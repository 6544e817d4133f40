"""From nothing to a trained model that talks: `make quickstart`, or `.venv/bin/python tools/quickstart.py`.

Runs the commands that a user would type, one after the other, and says how long each took. The corpus is the one
text that every machine with Python has: the standard library. Set QUICKSTART_STEPS=30 for a short run.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yml"
CORPUS = ROOT / "data" / "quickstart" / "corpus.json"
METRICS = ROOT / "runs" / "quickstart" / "metrics.jsonl"
PROMPTS = ROOT / "data" / "quickstart" / "prompts.txt"
SAMPLES = ROOT / "runs" / "quickstart" / "samples.jsonl"
EXPORT = ROOT / "exports" / "quickstart"
PROMPT_TEXTS = ("def test_", "class Counter(dict):\n", "import os\nimport sys\n\n")
WELL_BELOW = 0.75
"""A trained model's loss must be below this share of the corpus's unigram entropy."""


@dataclass(frozen=True)
class Stage:
    """One command of the quickstart, and what it is for."""

    title: str
    command: tuple[str, ...]


def stages(steps: int | None) -> list[Stage]:
    """Return the commands in their order; `steps` shortens the training, None leaves it to the YAML."""
    python = sys.executable
    shortened = ("--set", f"train_iters={steps}", f"eval_interval={steps}") if steps else ()
    return [
        Stage("prepare the data", (python, "tools/prepare_stdlib.py")),
        Stage("train", (python, "deepy.py", "train.py", CONFIG, *shortened)),
        Stage(
            "generate text",
            (
                *(python, "deepy.py", "generate.py", CONFIG, *shortened),
                *("-i", str(PROMPTS.relative_to(ROOT)), "-o", str(SAMPLES.relative_to(ROOT))),
            ),
        ),
        Stage(
            "export to Hugging Face",
            (
                python,
                "tools/ckpts/convert.py",
                "export",
                "checkpoints/quickstart",
                str(EXPORT.relative_to(ROOT)),
                "--overwrite",
            ),
        ),
    ]


def run_stage(number: int, count: int, stage: Stage) -> float:
    """Run one stage with its output on this terminal and return its seconds; its failure ends the quickstart."""
    shown = " ".join(part.replace(sys.executable, "python").replace("\n", "\\n") for part in stage.command)
    print(f"\n[{number}/{count}] {stage.title}: {shown}", flush=True)
    start = time.perf_counter()
    status = subprocess.run(stage.command, cwd=ROOT, check=False).returncode
    if status != 0:
        print(f"\nquickstart stopped: '{stage.title}' ended with exit code {status}; its message is above.", flush=True)
        raise SystemExit(status)
    return time.perf_counter() - start


def final_losses() -> tuple[float, float]:
    """Return the first and the last validation loss of the run, in nats per token."""
    records = [json.loads(line) for line in METRICS.read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "validation"]
    return losses[0], losses[-1]


def judge(full_run: bool) -> list[str]:
    """Compare the loss with the unigram entropy; return the lines to show, or stop if the model learned nothing."""
    corpus = json.loads(CORPUS.read_text())
    entropy = float(corpus["unigram_entropy_nats"])
    first, last = final_losses()
    lines = [
        f"validation loss  {first:.3f} -> {last:.3f} nats per token (perplexity {math.exp(last):.1f})",
        f"unigram entropy  {entropy:.3f} nats per token: what knowing only token frequencies would reach",
    ]
    if not last < first or (full_run and last > WELL_BELOW * entropy):
        raise SystemExit("\n".join([*lines, "quickstart failed: the loss did not fall as it must; see the plot."]))
    return lines


def show_samples(limit: int = 600) -> None:
    """Print what the model wrote."""
    for line in SAMPLES.read_text().splitlines():
        record = json.loads(line)
        print("-" * 100)
        print((record["context"] + record["text"])[:limit].rstrip())
    print("-" * 100)


def main() -> None:
    """Run all stages, then say what came of it."""
    steps = int(os.environ["QUICKSTART_STEPS"]) if os.environ.get("QUICKSTART_STEPS") else None
    PROMPTS.parent.mkdir(parents=True, exist_ok=True)
    PROMPTS.write_text("\n====\n".join(PROMPT_TEXTS))
    work = stages(steps)
    seconds = [run_stage(number, len(work), stage) for number, stage in enumerate(work, start=1)]
    print("\nWhat the model writes after these beginnings:")
    show_samples()
    for line in judge(full_run=steps is None):
        print(line)
    for stage, taken in zip(work, seconds, strict=True):
        print(f"{taken:7.1f} s  {stage.title}")
    print(f"{sum(seconds):7.1f} s  in all")
    print(f"""
loss plot    {METRICS.with_name("loss.png").relative_to(ROOT)}
checkpoint   checkpoints/quickstart
HF folder    {EXPORT.relative_to(ROOT)}

Next:
  ./deepy.py generate.py {CONFIG} --set text_gen_type=interactive     talk to it
  ./deepy.py train.py configs/125M.yml configs/local_setup.yml        a real model on the same data
  ./deepy.py train.py configs/125M.yml configs/local_setup.yml --check    what that would do, without doing it""")


if __name__ == "__main__":
    main()
