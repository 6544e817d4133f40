"""The widths of the feed-forward part, from the keys that set them."""

from __future__ import annotations

from megatron.config.schema.model import GATED_ACTIVATIONS


def mlp_widths(
    activation: str,
    hidden_size: int,
    intermediate_size: int | None,
    expansion_factor: float | None,
    multiple: int,
) -> tuple[int, int, bool]:
    """Return (rows of linear1, columns of linear2, gated).

    GPT-NeoX's rule: W is intermediate_size, or int(expansion_factor * h), or 4h; gated MLPs take int(2W/3) for both
    branches together; linear1 is rounded up to 2m and linear2 to m, with m = mlp_multiple_of. Where its two roundings
    disagree GPT-NeoX crashes; here a gated branch is half of linear1, and a plain MLP is W rounded up to m.
    """
    gated = activation in GATED_ACTIVATIONS
    width = intermediate_size or int((expansion_factor or 4) * hidden_size)
    if gated:
        branch = multiple * -(-(2 * width // 3) // (2 * multiple))
        return 2 * branch, branch, True
    plain = multiple * -(-width // multiple)
    return plain, plain, False
