"""The fp8 benchmark names what computes a float8 layer here."""

import torch

from benchmarks.fp8 import functions
from megatron.ops.choice import Situation


def test_what_is_measured_on_a_cpu():
    found = dict(functions(Situation(torch.device("cpu"), torch.bfloat16, 64)))
    assert {"bf16", "eager"} <= set(found)
    inputs, weight = torch.randn(16, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    torch.testing.assert_close(found["eager"](inputs, weight), found["bf16"](inputs, weight), rtol=0.1, atol=1.0)
