"""Config -> the model as a list of layer plans, or as a module.

embedding.word_embeddings, [embedding.position_embeddings], [embedding.dropout], layers.0 ..., final_norm, head

model = build_model(config, vocab_size_padded=50304, mesh=Mesh.single())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.schema.config import Config
from megatron.logs import get_logger
from megatron.model.cache import KVCache
from megatron.model.decoder import DecoderBlocks
from megatron.model.embedding import Dropout, LearnedPositions, SinusoidalPositions
from megatron.model.heads import LanguageHead, TiedEmbedding
from megatron.model.kernels import choose_kernels, require_agreement
from megatron.model.norm import NO_CHOICES, make_norm
from megatron.model.plan import LayerPlan
from megatron.model.recompute import Recompute
from megatron.model.sequential import SequentialModel
from megatron.model.stage import StageModel, StagePlan
from megatron.model.stream import Stream
from megatron.ops.choice import Choices
from megatron.ops.cross_entropy import block_losses
from megatron.ops.logits import share_losses
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import VocabParallelEmbedding
from megatron.parallel.mesh import Mesh
from megatron.parallel.vocab_loss import vocabulary_losses

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The dtype of the parameters for each `precision`."""

logger = get_logger(__name__)

_TIED = "word_embeddings"


def build_model(
    config: Config, vocab_size_padded: int, mesh: Mesh, initialized: bool = True, choices: Choices | None = None
) -> SequentialModel | StageModel:
    """Return this rank's part of the model on the mesh's device, in the config's precision: all of it, or its stage.

    initialized: draw the initial weights; False makes them zeros, for a checkpoint to fill.
    choices: what computes the operations; None chooses as the config asks, on the mesh's device.
    """
    dtype = DTYPES[config.numerics.weight_precision]
    if choices is None:
        choices = choose_kernels(config, mesh.device, dtype)
        if mesh.device.type == "cuda":
            require_agreement(choices, mesh.world)
    if config.training.offload_activations and mesh.device.type == "cpu" and mesh.world.rank == 0:
        logger.warning("offload_activations saves nothing on a CPU: activations are copied within its own memory")
    plans = build_plans(config, vocab_size_padded, mesh, choices)
    settings: dict[str, Any] = {
        "device": mesh.device,
        "dtype": dtype,
        "seed": config.numerics.seed if initialized else None,
        "tensor_axis": mesh.tp,
        "recompute": Recompute.of(config.training),
        "offload": config.training.offload_activations,
    }
    if mesh.pp.size == 1:
        return SequentialModel(plans, **settings)
    # plans keep what their layers share, on its device
    weightless = build_plans(config, vocab_size_padded, mesh, choices)
    split = StagePlan.of(weightless, mesh.pp.size, config.parallel.pipe_partition_method, mesh.tp)
    return StageModel(plans, split, mesh.pp.rank, **settings)


def build_plans(config: Config, vocab_size_padded: int, mesh: Mesh, choices: Choices = NO_CHOICES) -> list[LayerPlan]:
    """Return the plans of the decoder that the config describes.

    vocab_size_padded: rows of the word embedding and of the head. choices: what computes the operations.
    """
    model = config.model
    region = TensorRegion(mesh.tp, config.parallel.sequence_parallel, config.parallel.fp32_allreduce)
    blocks = DecoderBlocks(config, region, mesh.cp, choices)
    init = blocks.initializer(config.numerics.init_method)
    table = (vocab_size_padded, model.hidden_size, region, init)
    tied = not model.no_weight_tying
    losses = vocabulary_losses(
        region, choices.get("cross_entropy", block_losses), choices.get("share_losses", share_losses)
    )
    head = partial(TiedEmbedding if tied else LanguageHead, *table, losses)
    embedding = head if tied else partial(VocabParallelEmbedding, *table)
    share = _TIED if tied else None
    return [
        LayerPlan("embedding.word_embeddings", embedding, share, call=_start_stream),
        *_position_plans(config, blocks),
        *[LayerPlan(f"layers.{layer}", partial(blocks.build, layer)) for layer in range(model.num_layers)],
        LayerPlan("final_norm", partial(make_norm, model, choices=choices), call=_norm_stream),
        LayerPlan("head", head, share),
    ]


def _position_plans(config: Config, blocks: DecoderBlocks) -> list[LayerPlan]:
    """Return what happens to the word embeddings before the first block."""
    model, numerics = config.model, config.numerics
    offset, multiplier = model.opt_pos_emb_offset, numerics.mup_rp_embedding_mult
    init, axes = blocks.initializer(numerics.init_method), (blocks.region, blocks.context)
    rows = model.max_position_embeddings + offset
    makers: dict[str, Callable[[], nn.Module]] = {
        "learned": partial(LearnedPositions, rows, model.hidden_size, offset, multiplier, init, *axes),
        "sinusoidal": partial(SinusoidalPositions, model.hidden_size, offset, multiplier, *axes),
    }
    plans = []
    if model.pos_emb in makers:
        plans.append(LayerPlan("embedding.position_embeddings", makers[model.pos_emb]))
    if numerics.hidden_dropout:
        plans.append(LayerPlan("embedding.dropout", partial(Dropout, numerics.hidden_dropout, blocks.region)))
    return plans


def _start_stream(embedding: nn.Module, tokens: Tensor, segments: Tensor | None = None) -> Stream:
    return Stream(embedding(tokens), segments)


def _norm_stream(norm: nn.Module, stream: Stream, cache: KVCache | None = None) -> Stream:
    if stream.branch is None:
        return stream._replace(hidden=norm(stream.hidden))
    hidden, _ = norm(stream.branch, stream.hidden)
    return stream._replace(hidden=hidden, branch=None)
