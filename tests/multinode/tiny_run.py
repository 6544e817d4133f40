"""The tiny run of the multi-node scripts: its files, its losses on this machine alone, and the comparison.

python tests/multinode/tiny_run.py write FOLDER            # tiny.yml and the corpus
python tests/multinode/tiny_run.py local FOLDER            # the same, trained by two processes here
python tests/multinode/tiny_run.py compare FOLDER REFERENCE WHAT
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.end_to_end.tiny import losses, settings, write_corpus

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path) -> None:
    """Write the config and its corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus")
    (folder / "tiny.yml").write_text(
        yaml.safe_dump(settings(folder, train_iters=4, eval_iters=1, checkpoint_factor=100, eval_interval=100))
    )


def local(folder: Path) -> None:
    """Train with two processes on this machine and keep the losses."""
    write(folder)
    command = [sys.executable, "deepy.py", "train.py", str(folder / "tiny.yml"), "--set", "num_gpus=2"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder / "local.json").write_text(json.dumps(losses(folder)))


def compare(folder: Path, reference: Path, what: str) -> None:
    """Leave with a message where a loss of the run is another than the local run's in any bit."""
    here = {str(step): loss for step, loss in losses(folder).items()}
    there = json.loads((reference / "local.json").read_text())
    if here != there:
        sys.exit(f"{what}: losses {here}, and {there} on one machine")
    print(f"{what}: the {len(here)} losses of the local run, bit for bit")


if __name__ == "__main__":
    words = sys.argv[2:]
    if sys.argv[1] == "compare":
        compare(Path(words[0]), Path(words[1]), words[2])
    else:
        {"write": write, "local": local}[sys.argv[1]](Path(words[0]))
