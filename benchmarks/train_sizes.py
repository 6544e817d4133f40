"""The models that `train.py` measures: GPT-NeoX's shapes, with their batches and aims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 50304
ROTARY_SHARE = 0.25
LESS_MEMORY = {
    "moments_dtype": "bf16",
    "checkpoint_activations": True,
    "checkpoint_operations": ["norm", "activation"],
}


@dataclass(frozen=True)
class Size:
    """A model.

    rows, length: sequences of a step and their tokens. aim, published: tokens/s on one H200 that we aim at, and that
    others published; 0 where there is none. settings: keys of ours that it needs there.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    rows: int
    length: int
    aim: float = 0
    published: float = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


CPU_SIZES = (Size("19M", 6, 512, 8, 4, 512), Size("125M", 12, 768, 12, 2, 256))
GPU_SIZES = (
    Size("125M", 12, 768, 12, 32, 2048, 470e3, 430e3),
    Size("350M", 24, 1024, 16, 24, 2048, 181e3, 163e3),
    Size("1.3B", 24, 2048, 16, 16, 2048, 60e3, 54.5e3),
    Size("2.7B", 32, 2560, 32, 8, 2048, 31e3, 25.4e3),
    Size("6.9B", 32, 4096, 32, 4, 2048, 13.1e3, 11.0e3, LESS_MEMORY),
)


def settings(size: Size, precision: str, on_gpu: bool) -> dict[str, Any]:
    """Return our config of a size, as a YAML file would have it."""
    return {
        "num_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "seq_length": size.length,
        "max_position_embeddings": size.length,
        "pos_emb": "rotary",
        "rotary_pct": ROTARY_SHARE,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "precision": precision,
        "optimizer": {"type": "Adam", "params": OPTIMIZER},
        "weight_decay": 0.0,
        "gradient_clipping": CLIP,
        "lr_decay_style": "constant",
        "warmup": 0.0,
        "train_iters": 1000,
        "train_micro_batch_size_per_gpu": size.rows,
        **(size.settings if on_gpu else {}),
    }


OPTIMIZER = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8}
CLIP = 1.0
"""Largest norm of the gradient: the default of nanoGPT's, LitGPT's and Hugging Face's own training programs."""
