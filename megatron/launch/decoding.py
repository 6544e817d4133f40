"""How many processes share the model when text is generated, from the layout that the config trains with.

A checkpoint knows nothing of layouts. So a model that is too large for one GPU in training is shared by as many GPUs
here, all of them on the tensor axis: pipeline stages would wait for each other at every token.
"""

from __future__ import annotations

from megatron.config.schema.config import Config
from megatron.model.accounting import mlp_shape, padded_vocab_size


def decoding_processes(config: Config, most: int) -> int:
    """Return model_parallel_size * pipe_parallel_size where that many can share each layer and are there, else the
    first of model_parallel_size and 1 that is. most: processes that are there."""
    parallel = config.parallel
    wanted = (parallel.model_parallel_size * max(1, parallel.pipe_parallel_size), parallel.model_parallel_size, 1)
    return next(count for count in wanted if count <= max(1, most) and _can_share(config, count))


def _can_share(config: Config, count: int) -> bool:
    """Return whether `count` processes can share each layer of the config's model."""
    model = config.model
    rows = padded_vocab_size(1, model.make_vocab_size_divisible_by, config.parallel.model_parallel_size)
    cut = (model.num_attention_heads, model.num_kv_heads or count, mlp_shape(model)[1], rows)
    return count == 1 or not any(size % count for size in cut)
