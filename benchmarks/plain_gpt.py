"""The GPT-NeoX architecture as a nanoGPT-style model: one short file of plain PyTorch, as a good user writes it.

Parallel residual, rotary embeddings of a quarter of each head's features, untied head, GELU, SDPA. It is what
`train.py` measures beside: no library, no kernels of its own, nothing that costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_sizes import ROTARY_SHARE, VOCABULARY, Size


class PlainAttention(nn.Module):
    """Causal attention; qkv gives all queries, then all keys, then all values."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, h] -> [b, s, h]. cos, sin: [s, r] of the rotary features."""
        batch, length, hidden = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(hidden, dim=2)
        )
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.out(seen.transpose(1, 2).reshape(batch, length, hidden))
        return output


class PlainBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = PlainAttention(hidden, heads)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, h] -> [b, s, h]."""
        output: Tensor = x + self.attention(self.norm1(x), cos, sin) + self.down(F.gelu(self.up(self.norm2(x))))
        return output


class PlainGPT(nn.Module):
    """Token ids and labels [b, s] -> their mean cross entropy, in fp32."""

    def __init__(self, size: Size, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.hidden)
        self.blocks = nn.ModuleList(PlainBlock(size.hidden, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, VOCABULARY, bias=False)
        rotary = int(size.hidden // size.heads * ROTARY_SHARE)
        frequency = 1e4 ** -(torch.arange(0, rotary, 2).float() / rotary)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1))


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    turned, kept = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


_NAMES = {
    "embedding.word_embeddings": "embedding",
    "final_norm": "norm",
    "layers.": "blocks.",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "mlp.linear1": "up",
    "mlp.linear2": "down",
}


def plain_weights(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Return our model's weights under the names above, with the rows of qkv sorted by kind instead of by head."""
    found = {}
    for name, weight in weights.items():
        if "query_key_value" in name:
            rows = weight.view(heads, 3, -1, *weight.shape[1:])
            weight = rows.transpose(0, 1).reshape(weight.shape)
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = weight
    return found
