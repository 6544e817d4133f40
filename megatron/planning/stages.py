"""What each pipeline stage holds: the same layers that training puts there, by the same function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megatron.config.schema.config import Config
from megatron.parallel.pipeline import balanced_bounds, layer_kind, layer_weights
from megatron.planning.parameters import Item, Parameter, items


@dataclass(frozen=True)
class Stage:
    """The layers of the model on one pipeline stage, as one GPU of `tp` that share each of them holds them.

    blocks: numbers of its blocks. shared: parameters that other stages hold as well, by name, with how many hold them.
    """

    parts: tuple[Item, ...]
    blocks: range
    tp: int = 1
    shared: tuple[tuple[Parameter, int], ...] = ()

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its tensors; one that several of its layers use counts once."""
        return tuple({each.name: each for part in self.parts for each in part.parameters}.values())

    @cached_property
    def num_parameters(self) -> int:
        """Elements on one GPU."""
        return sum(parameter.numel(self.tp) for parameter in self.parameters)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest tensor on one GPU."""
        return max((parameter.numel(self.tp) for parameter in self.parameters), default=0)

    @property
    def has_embedding(self) -> bool:
        """Whether tokens become hidden states here."""
        return any(part.kind == "embedding" for part in self.parts)

    @property
    def has_head(self) -> bool:
        """Whether the loss is computed here."""
        return any(part.kind == "head" for part in self.parts)

    def num_partial(self, sequence_parallel: bool) -> int:
        """Return the elements whose gradient is partial on each process of the tensor axis."""
        kinds = {"tensor", "sequence"} if sequence_parallel else {"tensor"}
        return sum(parameter.numel() for parameter in self.parameters if parameter.partial in kinds and self.tp > 1)

    def num_persistent(self, threshold: int) -> int:
        """Return the elements of tensors so small that ZeRO 3 keeps them gathered."""
        sizes = (parameter.numel(self.tp) for parameter in self.parameters)
        return sum(size for size in sizes if size <= threshold)


def stages(config: Config, vocab_size: int, pp: int, tp: int = 1) -> list[Stage]:
    """Return what a GPU of each of `pp` pipeline stages holds, with `tp` sharing each layer.

    vocab_size: rows of the word embedding, padding included. Raises ConfigError where there are fewer blocks than
    stages, or `pipe_partition_method` finds no layers.
    """
    layers = items(config.model, vocab_size, config.numerics.hidden_dropout > 0)
    is_block = [layer.kind == "block" for layer in layers]
    kinds = [layer_kind(*layer.title, block) for layer, block in zip(layers, is_block, strict=True)]
    weights = layer_weights(config.parallel.pipe_partition_method, kinds, [layer.numel(tp) for layer in layers])
    bounds = balanced_bounds(weights, pp, is_block)
    result, block = [], 0
    for start, stop in pairwise(bounds):
        count = sum(is_block[start:stop])
        result.append(Stage(tuple(layers[start:stop]), range(block, block + count), tp))
        block += count
    return [Stage(one.parts, one.blocks, tp, _shared(one, result)) for one in result]


def _shared(stage: Stage, all_stages: list[Stage]) -> tuple[tuple[Parameter, int], ...]:
    names = [{parameter.name for parameter in one.parameters} for one in all_stages]
    holders = {parameter: sum(parameter.name in held for held in names) for parameter in stage.parameters}
    return tuple((parameter, count) for parameter, count in holders.items() if count > 1)
