"""Launcher start to first training step, beside the bare `import torch, deepspeed`, alternating in the same run.

    python benchmarks/startup.py [--quick] [--json FILE] [--enforce]

Measured with the quickstart's config and warm caches, on one process. The clock of the launcher starts before
Python does and stops where the first optimizer step begins: it holds the launcher, the worker, torch, DeepSpeed, the
tokenizer, the data set, the model and the engine. Validation at step 0 is left out, as the step itself is.
The clock of the bare import starts before Python too, and stops when both packages are imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yml"
DATA = ROOT / "data" / "quickstart"
AIM = 1.5
BARE = "import torch, deepspeed, time; print(time.time())"


def bare_import() -> float:
    """Return the seconds from before the interpreter's start until torch and deepspeed are imported."""
    begin = time.time()
    result = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True, env=_environment(begin)
    )
    return float(result.stdout.split()[-1]) - begin


def launcher_to_first_step(folder: Path, overrides: list[str]) -> float:
    """Return the seconds from before `deepy.py` starts until the first optimizer step begins."""
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), str(CONFIG), "--set", *overrides]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=_environment(time.time()), check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {result.returncode}:\n{result.stderr[-3000:]}")
    records = [json.loads(line) for line in (folder / "startup" / "metrics.jsonl").read_text().splitlines()]
    return float(next(record["seconds_since_launch"] for record in records if record["event"] == "first_step"))


def _environment(begin: float) -> dict[str, str]:
    """Return the variables of both sides; bytecode is cached, as it is for any user after the first run."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {"DS_ACCELERATOR": "cpu", **kept, "DEEPY_LAUNCH_TIME": repr(begin)}


def _overrides(folder: Path) -> list[str]:
    """Return what makes a run of one step that writes into `folder` only."""
    overrides = [f"runs_dir={folder}", "run_name=startup", "train_iters=1", "eval_iters=0", "save=null", "load=null"]
    overrides += ["checkpoint_factor=null", "resume=never", "use_wandb=false", "tensorboard_dir=null"]
    if not (DATA.is_dir() and any(DATA.glob("*.idx"))):
        overrides += _small_corpus(folder)
    return overrides


def _small_corpus(folder: Path) -> list[str]:
    """Write a corpus of bytes where the quickstart's data is not prepared, and return the keys that point to it."""
    import numpy as np

    from megatron.data.indexed import IndexedWriter

    text = Path(subprocess.__file__).read_bytes() + Path(argparse.__file__).read_bytes()
    with IndexedWriter(folder / "corpus", np.uint16) as writer:
        for start in range(0, 8 * len(text), len(text) // 10):
            writer.add_document([*(text * 9)[start : start + len(text) // 10], 0])
    return [f"data_path={folder / 'corpus'}", "tokenizer_type=CharLevelTokenizer", "vocab_file=null"]


def measure(repeats: int) -> dict[str, object]:
    """Return the medians in seconds, all single values, and the ratio of the medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = _overrides(folder)
        launcher_to_first_step(folder, overrides)  # warms the file cache and builds the data index
        bare_import()
        pairs = [(bare_import(), launcher_to_first_step(folder, overrides)) for _ in range(repeats)]
    bare, launched = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "import_torch_deepspeed_seconds": round(bare, 3),
        "launcher_to_first_step_seconds": round(launched, 3),
        "ratio": round(launched / bare, 3),
        "aim": AIM,
        "data": "quickstart" if len(overrides) < 11 else "a small corpus of bytes",
        "pairs": [[round(value, 3) for value in pair] for pair in pairs],
    }


def main() -> int:
    """Measure, print, and judge if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 pairs instead of 9")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--enforce", action="store_true", help="exit 1 where the aim is missed")
    arguments = parser.parse_args()
    result = measure(3 if arguments.quick else 9)
    print(
        f"launcher to first step {result['launcher_to_first_step_seconds']} s, bare import of torch and deepspeed "
        f"{result['import_torch_deepspeed_seconds']} s, ratio {result['ratio']} (aim: at most {AIM}); "
        f"data: {result['data']}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.enforce and float(str(result["ratio"])) > AIM:
        print(f"MISSED: launcher to first step is {result['ratio']} times the bare import, more than {AIM}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
