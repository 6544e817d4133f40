"""Each test runs in a Python of its own: what is measured is what that process has loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.multinode.tiny_run import write

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import torch
from megatron.launch.lean import defer_compiler
torch.manual_seed(0)
def steps(kind):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = kind([weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (weight ** 2).sum().backward()
        optimizer.step()
    assert optimizer.state_dict()["state"] is not None
    return weight.detach().clone()
defer_compiler()
KINDS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
without = [steps(kind) for kind in KINDS]
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"
import torch._dynamo
for kind, expected in zip(KINDS, without):
    assert torch.equal(steps(kind), expected)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
from megatron.engine.deferred import at_first_call
calls = []
@at_first_call(lambda function, **options: calls.append(options) or (lambda x: function(x) + 1))(mode="fast")
def double(x):
    return 2 * x
assert calls == [] and double.__name__ == "double"
assert (double(3), double(4), calls) == (7, 9, [{"mode": "fast"}])
print("done")
"""


def test_optimizers_run_without_the_compiler_and_alike_with_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.strip() == "done", result.stderr


UNUSED = {
    "deepspeed", "transformers", "triton", "torch._dynamo", "torch._inductor", "fsspec", "s3fs", "boto3", "wandb",
    "tensorboard", "comet_ml", "sentencepiece", "tiktoken", "pandas", "scipy", "sklearn",
}  # fmt: skip


def test_a_run_on_a_cpu_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """Launcher and worker tell each module that they import: torch is the worker's alone, and no library is idle."""
    write(tmp_path)
    command = [sys.executable, "deepy.py", "train.py", str(tmp_path / "tiny.yml"), "--set", "train_iters=1"]
    told = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=told)
    assert result.returncode == 0, result.stderr[-3000:]
    imported = re.findall(r"import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)", result.stderr)
    assert "megatron.training.loop" in imported
    assert not UNUSED & set(imported)
    assert imported.count("torch") == 1
