"""The layer plans as one plain module: what ZeRO 0 to 3, generation and tests use.

    logits = model(tokens)                                     # [b, s] -> [b, s, v]
    losses = model(tokens, labels=labels)                      # [b, s] fp32, one per token
    total = model(tokens, labels=labels, loss_mask=mask)       # fp32 scalar: sum of the masked losses
    logits = model(tokens, cache=cache)                        # of the new tokens, with a KVCache

The third form is the one to train with: it finishes the head's gradients in the forward pass.
"""

from __future__ import annotations

from torch import Tensor

from megatron.model.assemble import full_shapes
from megatron.model.cache import KVCache
from megatron.model.planned import PlannedModel


class SequentialModel(PlannedModel):
    """Builds the plans in order and runs them in order; arguments as in `PlannedModel`.

    The ranks of the tensor axis call the model together and all get the same result, whole.
    Parameters are named canonically: `named_parameters()` yields `<plan name>.<name in the module>`.
    """

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return logits, losses or their sum, as the module's docstring lists.

        tokens, labels [b, s] int64; loss_mask [b, s] fp32; segments [b, s] int64 document numbers: a token attends to
        its own document only; cache: the tokens follow those that it holds.
        """
        stream = self._through(self._call(0, tokens, segments), cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        output: Tensor = self._call(len(self.plans) - 1, stream, labels, loss_mask)
        return output

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every weight, by canonical name."""
        return full_shapes(self, self.tensor_size)
