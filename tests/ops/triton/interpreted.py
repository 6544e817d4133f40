"""Imports triton and every kernel: for the GPU where there is one, and else for Triton's interpreter on CPU tensors.

TRITON_INTERPRET counts while triton and the kernels are imported, and is gone afterwards: no other test of this
process, and no process that it starts, sees it. It must be the first to import triton, which torch._dynamo does too:
`tests/conftest.py` sees to that.
"""

from __future__ import annotations

import os
import sys

import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    assert "triton" not in sys.modules, "something imported triton before the tests could choose its interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.experimental.gluon  # noqa: F401  (triton imports it late, and it asks for TRITON_INTERPRET too)

    import megatron.ops.triton.launch
    import megatron.ops.triton.samples  # noqa: F401  (imports every kernel)
finally:
    os.environ.pop("TRITON_INTERPRET", None)
