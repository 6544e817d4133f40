"""One decoder block from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from megatron.config.schema.config import Config
from megatron.model.accounting import layer_types, mlp_shape
from megatron.model.across import make_across
from megatron.model.attention import SelfAttention
from megatron.model.attention_choice import attend, part_kernels
from megatron.model.block import ParallelBlock, PreNormBlock
from megatron.model.init import make_initializer
from megatron.model.kernels import activation_operation
from megatron.model.mlp import MLP
from megatron.model.norm import INSIDE, NO_CHOICES, OUTSIDE, make_head_norm, make_norm
from megatron.model.positions import ALONE, AttentionMask, RelativePositionBias, RotaryTables, make_slopes
from megatron.model.recompute import Recompute, recomputed_operations
from megatron.ops.activations import make_activation
from megatron.ops.choice import Choices
from megatron.ops.dropout_add import add_dropped
from megatron.ops.fp8 import float8_linear
from megatron.parallel.collectives import TensorRegion
from megatron.parallel.layers import Initializer, multiply_by
from megatron.parallel.mesh import Axis


@dataclass(frozen=True)
class DecoderBlocks:
    """Makes the blocks of one model; what they share (tables, masks, the rpe table) is made once.

    region: the tensor axis of the mesh, and how its ranks meet. context: the context axis.
    choices: what computes the operations.
    """

    config: Config
    region: TensorRegion
    context: Axis = ALONE
    choices: Choices = NO_CHOICES

    def initializer(self, method: str) -> Initializer:
        """Return the initializer of a method name for this model's width and depth."""
        model, std = self.config.model, self.config.numerics.init_method_std
        return make_initializer(method, std, model.num_layers, model.hidden_size)

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.config.model.hidden_size // self.config.model.num_attention_heads

    @cached_property
    def rotary(self) -> RotaryTables | None:
        """Tables of the first rotary_pct of each head's features, which the config's rules make an even number."""
        model = self.config.model
        if model.pos_emb != "rotary":
            return None
        return RotaryTables(int(self.head_dim * model.rotary_pct), model.rotary_emb_base)

    @cached_property
    def rpe(self) -> RelativePositionBias | None:
        """The table of relative positions that all layers share."""
        model = self.config.model
        if model.pos_emb != "rpe":
            return None
        return RelativePositionBias(
            model.rpe_num_buckets,
            model.rpe_max_distance,
            model.num_attention_heads,
            self.head_dim**0.5,
            self.region.axis,
            self.initializer("xavier_normal"),
        )

    @cached_property
    def masks(self) -> dict[str, AttentionMask]:
        """The mask of each attention type.

        Where a model has "local" layers the window is theirs alone; otherwise it is every layer's.
        """
        model = self.config.model
        slopes = make_slopes(model.num_attention_heads, self.region.axis) if model.pos_emb == "alibi" else None
        local = AttentionMask(model.sliding_window_width, slopes)
        return {"local": local, "global": AttentionMask(None, slopes) if "local" in layer_types(model) else local}

    def build(self, layer: int) -> nn.Module:
        """Return block number `layer`, counted from 0."""
        model = self.config.model
        parallel = model.gpt_j_residual
        spec = INSIDE if parallel else OUTSIDE
        block = (ParallelBlock if parallel else PreNormBlock)(
            input_layernorm=make_norm(model, spec, self.choices),
            attention=self._attention(layer),
            post_attention_layernorm=None if parallel and model.gpt_j_tied else make_norm(model, spec, self.choices),
            mlp=self._mlp(layer),
            dropout=self.config.numerics.hidden_dropout,
            region=self.region,
            add_dropped=self.choices.get("add_dropped", add_dropped),
            recompute_norms="norm" in recomputed_operations(self.config.training, layer),
            defers=not self._is_recomputed(layer),
        )
        if self.config.numerics.precision == "fp8":
            multiply_by(self.choices.get("float8_linear", float8_linear), block)
        return block

    def _is_recomputed(self, layer: int) -> bool:
        """Return whether a block keeps one tensor for its norms or for itself, to which nothing may be left to add."""
        whole = Recompute.of(self.config.training)
        is_whole = whole.together > 0 and (whole.first is None or layer < whole.first)
        return is_whole or "norm" in recomputed_operations(self.config.training, layer)

    def _attention(self, layer: int) -> SelfAttention:
        model, numerics = self.config.model, self.config.numerics
        kind = layer_types(model)[layer]
        method = self.config.parallel.context_parallel_method
        attends = attend(self.config, kind, self.choices)
        return SelfAttention(
            layer=layer,
            hidden_size=model.hidden_size,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_kv_heads or model.num_attention_heads,
            region=self.region,
            init=self.initializer(numerics.init_method),
            output_init=self.initializer(numerics.output_layer_init_method),
            bias=model.use_bias_in_attn_linear,
            dropout=numerics.attention_dropout,
            mask=self.masks[kind],
            rotary=self.rotary,
            rpe=self.rpe,
            qk_norm=make_head_norm(model, self.region) if model.use_qk_layernorm else None,
            across=make_across(self.context, method, attends, part_kernels(self.config, kind, self.choices)),
            key_scaling=float(max(1, layer)) if numerics.apply_query_key_layer_scaling else 1.0,
            recompute="attention" in recomputed_operations(self.config.training, layer),
            turn=self.choices.fused("rotate_packed"),
            attend=attends,
        )

    def _mlp(self, layer: int) -> MLP:
        model, numerics = self.config.model, self.config.numerics
        rows, columns, gated = mlp_shape(model)
        return MLP(
            hidden_size=model.hidden_size,
            linear1_rows=rows,
            linear2_columns=columns,
            gated=gated,
            activation=make_activation(model.activation, tanh_gelu=numerics.bias_gelu_fusion),
            region=self.region,
            init=self.initializer(numerics.init_method),
            output_init=self.initializer(numerics.output_layer_init_method),
            bias=model.use_bias_in_mlp,
            recompute="activation" in recomputed_operations(self.config.training, layer),
            fused=self.choices.fused(activation_operation(self.config)),
        )
