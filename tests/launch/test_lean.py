"""Each test runs in a Python of its own: what is measured is what that process has loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
