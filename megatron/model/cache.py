"""Keys and values of the tokens already seen, so that decoding computes each token once.

Columns count the tokens fed so far and are common to all rows; a row whose prompt is shorter starts with `padding`
columns that are no tokens: its position in a document is column - padding, and no token attends to its padding.

    cache = KVCache(config.model, batch=2, max_length=64, device="cpu", dtype=torch.float32)
    cache.set_padding(torch.tensor([0, 3]))          # the second row's tokens[:, :3] are padding
    logits = model(prompts, cache=cache)              # [2, s, v]
    logits = model(next_tokens, cache=cache)          # [2, 1, v]
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.schema.model import ModelConfig


class KVCache:
    """Room for `max_length` columns of every layer.

    batch: rows. max_length: prompt and generated tokens together. shares: tensor-parallel ranks that share the heads.
    `length` is the number of columns filled; `padding` [b] int64 the leading columns of each row that are no tokens,
    or None where no row has any.
    """

    def __init__(
        self,
        model: ModelConfig,
        batch: int,
        max_length: int,
        device: str | torch.device,
        dtype: torch.dtype,
        shares: int = 1,
    ) -> None:
        head_dim = model.hidden_size // model.num_attention_heads
        key_heads = value_heads = model.num_kv_heads or model.num_attention_heads
        if model.use_qk_layernorm:  # its gains differ per query head, so keys and values are stored per query head
            key_heads = value_heads = model.num_attention_heads
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self.padding: Tensor | None = None
        shape = (model.num_layers, batch, key_heads // shares, max_length, head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty((*shape[:2], value_heads // shares, *shape[3:]), device=device, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self._keys.nbytes + self._values.nbytes

    def set_padding(self, padding: Tensor) -> None:
        """Declare the number of leading padding columns of each row, [b] int64; call it before the first tokens."""
        assert self.length == 0, "padding is declared before the first tokens"
        self.padding = padding.to(self._keys.device) if bool(padding.any()) else None

    def reset(self) -> None:
        """Forget everything, so that the cache can serve other prompts."""
        self.length = 0
        self.padding = None

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [b, k, q, d] after column `length`, and return all [b, k, length + q, d]."""
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens, and {end} are asked of it")
        self._keys[layer, :, :, self.length : end] = key
        self._values[layer, :, :, self.length : end] = value
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` columns as filled; the model calls it once every layer has stored them."""
        self.length += num_tokens
