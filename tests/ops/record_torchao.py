"""Records what torchao's float8 linear layer computes, for test_fp8.py.

pip install torchao==0.18.0 && python tests/ops/record_torchao.py     # writes torchao_float8.safetensors beside it

The library itself is no dependency of the tests: wherever it is installed, transformers imports it, with complaints.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.ops.test_fp8 import INPUTS, OUTPUTS, RECORDED, ROWS, draw, run


def main() -> None:
    """Write outputs and gradients, with real float8 products and with emulated ones."""
    import torchao
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    found = {}
    for rows in ROWS:
        x, weight, _, dy = draw(rows)
        for emulate in (False, True):
            layer = Float8Linear(INPUTS, OUTPUTS, bias=False, config=Float8LinearConfig(emulate=emulate), dtype=x.dtype)
            results = run(lambda x, w, layer=layer: functional_call(layer, {"weight": w}, x), x, weight, None, dy)
            for name, result in zip(("y", "dx", "dw"), results, strict=True):
                found[f"{rows} {'emulated' if emulate else 'float8'} {name}"] = result.contiguous()
    save_file(found, RECORDED, {"torchao": torchao.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
