"""The passes of a model copy nothing from the host to the device: each such copy makes the host wait for a GPU, and no
CUDA graph can hold it. The device is "meta" here, from which nothing could be read either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.model.build import build_model
from megatron.model.positions import ALONE, AttentionMask, Span, make_slopes
from megatron.parallel.mesh import Mesh
from tests.model.models import VOCAB, small_config

META = torch.device("meta")
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {"pos_emb": "rotary", "sliding_window_width": 3},
    "alibi": {"pos_emb": "alibi", "sliding_window_width": 3, "hidden_dropout": 0.1},
    "rpe": {"pos_emb": "rpe", "norm": "rmsnorm", "activation": "swiglu"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "learned": {"pos_emb": "learned"},
}


class Copies(TorchDispatchMode):
    """Notes the operations between devices, of which numbers of the host have none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if len({tensor.device for tensor in tensors}) > 1 and any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_passes_copy_nothing(name: str, documents: bool) -> None:
    model = build_model(small_config(**MODELS[name]), VOCAB, Mesh.single(META))
    found = []
    for _ in range(2):  # what is kept from the first may be copied there
        tokens = torch.zeros(2, 6, dtype=torch.int64, device=META)
        mask = torch.ones(2, 6, device=META)
        with Copies() as copies:
            segments = torch.zeros_like(tokens) if documents else None
            model(tokens, labels=tokens, loss_mask=mask, segments=segments).backward()
        found.append(copies.found)
    assert found[1] == []
    assert len(found[0]) <= 1


def test_slopes_go_to_the_device_once() -> None:
    """Back ends that take them as they are find them there at each call, and after a call on another device too."""
    mask = AttentionMask(None, make_slopes(4, ALONE))
    mask(0.3, Span(0, 5), None, None, torch.device("cpu"))
    first, again = (mask(0.3, Span(0, 5), None, None, META).slopes for _ in range(2))
    assert first is not None
    assert first.device == META
    assert again is first


def test_a_copy_would_be_seen() -> None:
    with Copies() as copies:
        torch.ones(3).to(META)
    assert copies.found
