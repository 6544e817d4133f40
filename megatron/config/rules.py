"""Rules across keys: each a small function that yields a Problem for what cannot stand.

A rule reads values as attributes of the draft; where one of them is itself wrong the rule is skipped, so that
nothing is reported twice. They hold for every config; `readiness` says what a run needs besides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from megatron.config import combinations, keys
from megatron.config.attention import expand_attention
from megatron.config.blocks import SpikeGuard
from megatron.config.draft import Draft, either
from megatron.config.duration import wall_time_is_a_duration
from megatron.config.engine import engine_can_run
from megatron.config.float8 import float8_reaches_a_layer
from megatron.config.split import split_shares
from megatron.config.widths import mlp_widths
from megatron.errors import Problem

TRIANGLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
Rule = Callable[[Draft], Iterator[Problem]]


def _divisors(number: int, most: int = 12) -> str:
    """Return the divisors of a number as "1, 2 or 4"; the largest ones where there are many."""
    return either([candidate for candidate in range(1, number + 1) if number % candidate == 0][-most:])


def heads_divide_hidden(d: Draft) -> Iterator[Problem]:
    """Each head takes hidden_size / num_attention_heads features."""
    heads, hidden = d.num_attention_heads, d.hidden_size
    if hidden % heads:
        why = f"hidden_size = {hidden} cannot be divided among it ({hidden} % {heads} = {hidden % heads})."
        near = sorted((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))[:4]
        fix = f"Set num_attention_heads to {either(sorted(near))}."
        yield d.problem("num_attention_heads", heads, why, fix)


def kv_heads_divide_heads(d: Draft) -> Iterator[Problem]:
    """Query heads share key-value heads in equal groups."""
    groups, heads = d.num_kv_heads, d.num_attention_heads
    if groups and heads % groups:
        why = f"num_attention_heads = {heads} is not a multiple of it."
        yield d.problem("num_kv_heads", groups, why, f"Set num_kv_heads to {_divisors(heads)}.")


def heads_divide_over_processes(d: Draft) -> Iterator[Problem]:
    """Tensor parallelism splits whole heads."""
    tp, heads, groups = d.model_parallel_size, d.num_attention_heads, d.num_kv_heads
    if heads % tp:
        why = f"it cannot be split over model_parallel_size = {tp} ({heads} % {tp} = {heads % tp})."
        fix = f"Set model_parallel_size to {_divisors(heads)}."
        yield d.problem("num_attention_heads", heads, why, fix)
    elif groups and groups % tp:
        why = f"it cannot be split over model_parallel_size = {tp} ({groups} % {tp} = {groups % tp})."
        yield d.problem("num_kv_heads", groups, why, f"Set model_parallel_size to {_divisors(groups)}.")


def sequence_divides_over_processes(d: Draft) -> Iterator[Problem]:
    """Each context parallel process computes two equal chunks of every sequence, so that all have the same work."""
    cp, length = d.context_parallel_size, d.seq_length
    if cp > 1 and length % (2 * cp):
        why = f"context_parallel_size = {cp} cuts it into {2 * cp} chunks ({length} % {2 * cp} = {length % (2 * cp)})."
        below = length // (2 * cp) * 2 * cp
        fix = f"Set seq_length to {either([n for n in (below, below + 2 * cp) if n])}, or use fewer processes."
        yield d.problem("seq_length", length, why, fix)


def context_parallel_attention(d: Draft) -> Iterator[Problem]:
    """The ring never holds a table of all positions or a random mask of all pairs; all_to_all splits whole heads."""
    cp, tp, method = d.context_parallel_size, d.model_parallel_size, d.context_parallel_method
    if cp == 1:
        return
    if method == "ring":
        asked = {"attention_dropout": d.attention_dropout or None, "pos_emb": "rpe" if d.pos_emb == "rpe" else None}
        for key, value in asked.items():
            if value is not None:
                why = f"context_parallel_method = ring (context_parallel_size = {cp}) cannot apply it."
                fix = f"Set context_parallel_method: all_to_all, or {key}: {'rotary' if key == 'pos_emb' else 0}."
                yield d.problem(key, value, why, fix)
        return
    key = "num_kv_heads" if d.num_kv_heads else "num_attention_heads"
    heads = d.num_kv_heads or d.num_attention_heads
    if heads % (tp * cp):
        why = f"{key} = {heads} cannot be split over context_parallel_size = {cp} x model_parallel_size = {tp}."
        fix = "Set context_parallel_method: ring, which takes any number of heads."
        yield d.problem("context_parallel_method", method, why, fix)


def mlp_divides_over_processes(d: Draft) -> Iterator[Problem]:
    """Tensor parallelism splits the features between the two matrices of the MLP."""
    tp = d.model_parallel_size
    keys_of_width = (d.activation, d.hidden_size, d.intermediate_size, d.expansion_factor, d.mlp_multiple_of)
    _, width, gated = mlp_widths(*keys_of_width)
    if width % tp:
        branch = " in each branch" if gated else ""
        why = f"the MLP has {width} features{branch}, which cannot be split over model_parallel_size = {tp}."
        fix = f"Set mlp_multiple_of to a multiple of {tp}, which rounds the width up, or another intermediate_size."
        yield d.problem("intermediate_size", d.intermediate_size, why, fix)


def tokens_divide_over_processes(d: Draft) -> Iterator[Problem]:
    """Sequence parallelism gives each tensor parallel process an equal part of the tokens that they compute."""
    tp, cp, length = d.model_parallel_size, d.context_parallel_size, d.seq_length
    if d.sequence_parallel and length % (tp * cp):
        shared = f" x context_parallel_size = {cp}" if cp > 1 else ""
        why = f"sequence_parallel splits it over model_parallel_size = {tp}{shared} ({length} % {tp * cp} > 0)."
        fix = f"Set seq_length to {-(-length // (tp * cp)) * tp * cp}, or sequence_parallel to false."
        yield d.problem("seq_length", length, why, fix)


def rotary_is_even(d: Draft) -> Iterator[Problem]:
    """Rotation turns pairs of features."""
    if d.pos_emb != "rotary" or d.hidden_size % d.num_attention_heads:
        return
    head = d.hidden_size // d.num_attention_heads
    rotated = head if d.rotary_pct == 1 else int(head * d.rotary_pct)
    if rotated % 2 or not rotated:
        why = f"int({d.rotary_pct} x {head} features per head) = {rotated} features cannot be rotated in pairs."
        pairs = [2 * n / head for n in range(1, head // 2 + 1)]
        near = sorted(pairs, key=lambda share: abs(share - d.rotary_pct))[:1]
        fix = f"Set rotary_pct to {near[0]:g}." if near else "Use fewer heads, so that a head has 2 or more features."
        yield d.problem("rotary_pct", d.rotary_pct, why, fix)


def positions_cover_sequence(d: Draft) -> Iterator[Problem]:
    """The position table must hold every position of a sample."""
    if d.max_position_embeddings < d.seq_length:
        why = f"it is less than seq_length = {d.seq_length}."
        fix = f"Set max_position_embeddings to {d.seq_length} or more."
        yield d.problem("max_position_embeddings", d.max_position_embeddings, why, fix)


def stages_have_layers(d: Draft) -> Iterator[Problem]:
    """Each pipeline stage holds layers, shared out by a method that exists."""
    stages, method = d.pipe_parallel_size, d.pipe_partition_method
    if stages > d.num_layers:
        why = f"each stage needs a layer, and num_layers = {d.num_layers}."
        yield d.problem("pipe_parallel_size", stages, why, f"Set pipe_parallel_size to {d.num_layers} or less.")
    problem = _method_problem(method)
    if problem:
        fix = "Set pipe_partition_method: parameters (or uniform, or type:<regular expression>)"
        yield d.problem("pipe_partition_method", method, problem, fix)


def _method_problem(method: str) -> str | None:
    if not method.startswith("type:"):
        return None if method in ("parameters", "uniform") else "there is no such method."
    try:
        re.compile(method.removeprefix("type:"))
    except re.error as error:
        return f"it is no regular expression: {error}."
    return None


def recomputed_whole_or_in_part(d: Draft) -> Iterator[Problem]:
    """Blocks are recomputed whole, or single operations of them are."""
    if d.checkpoint_operations is not None and d.checkpoint_num_layers > 1:
        why = "checkpoint_operations recomputes parts of blocks, and never several blocks together."
        yield d.problem("checkpoint_num_layers", d.checkpoint_num_layers, why, "Keep one of the two.")


def one_mlp_width(d: Draft) -> Iterator[Problem]:
    """intermediate_size and expansion_factor are two ways to say one thing."""
    if d.intermediate_size is not None and d.expansion_factor is not None:
        why = f"expansion_factor = {d.expansion_factor:g} sets the MLP's width as well."
        yield d.problem("intermediate_size", d.intermediate_size, why, "Keep one of the two.")


def attention_pattern_fits(d: Draft) -> Iterator[Problem]:
    """attention_config names each layer once, and local layers have a width."""
    try:
        types = expand_attention(d.attention_config, d.num_layers)
    except ValueError as error:
        fix = 'Write attention_config: [[["global"], "all"]]'
        yield d.problem("attention_config", d.attention_config, f"{error}.", fix)
        return
    if "local" in types and d.sliding_window_width is None:
        why = "local layers see a window of sliding_window_width tokens, which is not set."
        yield d.problem("attention_config", d.attention_config, why, "Add sliding_window_width: 256, for example.")


def tied_norm_needs_parallel_residual(d: Draft) -> Iterator[Problem]:
    """gpt_j_tied is a form of gpt_j_residual."""
    if d.gpt_j_tied and not d.gpt_j_residual:
        why = "it has no meaning without gpt_j_residual."
        yield d.problem("gpt_j_tied", True, why, "Add gpt_j_residual: true, or remove gpt_j_tied.")


def fused_gelu_needs_gelu(d: Draft) -> Iterator[Problem]:
    """bias_gelu_fusion chooses between two forms of gelu."""
    if d.bias_gelu_fusion and d.activation != "gelu":
        why = f"it is the tanh form of gelu, and activation is {d.activation}."
        yield d.problem("bias_gelu_fusion", True, why, "Remove bias_gelu_fusion, or set activation: gelu")


def split_is_possible(d: Draft) -> Iterator[Problem]:
    """split holds one to three shares, the first of which is positive."""
    try:
        split_shares(d.split)
    except ValueError as error:
        yield d.problem("split", d.split, f"{error}.", 'Write three shares such as split: "969, 30, 1"')


def one_source_of_data(d: Draft) -> Iterator[Problem]:
    """data_path is divided by split; *_data_paths are divided already."""
    listed = [f"{name}_data_paths" for name in ("train", "valid", "test") if getattr(d, f"{name}_data_paths")]
    if d.data_path and listed:
        yield d.problem("data_path", d.data_path, f"{listed[0]} names data too.", "Keep one of the two.")
    if listed and "train_data_paths" not in listed:
        why = "train_data_paths is not set."
        yield d.problem(listed[0], getattr(d, listed[0]), why, "Add train_data_paths: [prefix]")
    if d.data_path and "," in d.data_path and not os.path.exists(f"{d.data_path}.bin"):
        paths = ", ".join(part.strip() for part in d.data_path.split(","))
        yield d.problem("data_path", d.data_path, "it is one prefix, not a list.", f"Write train_data_paths: [{paths}]")


def lists_match(d: Draft) -> Iterator[Problem]:
    """Labels and weights have one entry for each data set."""
    for name in ("train", "valid", "test"):
        paths = getattr(d, f"{name}_data_paths")
        for key in (f"{name}_label_data_paths", f"{name}_data_weights"):
            entries = getattr(d, key)
            if entries is not None and len(entries) != len(paths or []):
                why = f"it has {len(entries)} entries, and {name}_data_paths has {len(paths or [])}."
                yield d.problem(key, entries, why, "Give one entry for each data set.")
        weights = getattr(d, f"{name}_data_weights")
        if weights and not all(0 < weight < float("inf") for weight in weights):
            why = "it holds a weight that is not a positive number."
            fix = f"Remove such a data set from {name}_data_paths together with its weight."
            yield d.problem(f"{name}_data_weights", weights, why, fix)
        if weights and d.weight_by_num_documents:
            why = "weight_by_num_documents derives the weights from document counts."
            yield d.problem(f"{name}_data_weights", weights, why, "Keep one of the two.")


def one_length_of_training(d: Draft) -> Iterator[Problem]:
    """A run is measured in steps or in epochs."""
    if d.train_iters is not None and d.train_epochs is not None:
        why = f"train_iters = {d.train_iters} says how long training runs too."
        yield d.problem("train_epochs", d.train_epochs, why, "Keep one of the two.")
    if d.train_epochs is not None and (d.weight_by_num_documents or len(set(d.train_data_weights or [])) > 1):
        why = "it counts passes over every training data set, but they have different weights."
        yield d.problem("train_epochs", d.train_epochs, why, "Set train_iters instead, or remove the weights.")


def learning_rate_is_a_range(d: Draft) -> Iterator[Problem]:
    """The floor of the learning rate is below its peak."""
    peak = d.optimizer["params"]["lr"]
    if d.min_lr > peak:
        fix = f"Set min_lr to {peak:g} or less (a tenth, {peak / 10:g}, is usual)."
        yield d.problem("min_lr", d.min_lr, f"it is more than the peak, optimizer.params.lr = {peak:g}.", fix)
    if d.lr_decay_iters is not None and d.lr_decay_fraction is not None:
        why = f"lr_decay_iters = {d.lr_decay_iters} sets the horizon as well."
        yield d.problem("lr_decay_fraction", d.lr_decay_fraction, why, "Keep one of the two.")
    if d.lr_decay_style == "wsd" and d.warmup + d.wsd_decay_fraction > 1:
        why = f"with warmup = {d.warmup:g} there is no room for both (their sum is more than 1)."
        yield d.problem("wsd_decay_fraction", d.wsd_decay_fraction, why, "Make one of them smaller.")


def one_schedule_on_resume(d: Draft) -> Iterator[Problem]:
    """A run that goes on follows its own schedule or the checkpoint's."""
    if d.override_lr_scheduler and d.use_checkpoint_lr_scheduler:
        why = "use_checkpoint_lr_scheduler = true asks for the opposite."
        yield d.problem("override_lr_scheduler", True, why, "Keep one of the two.")


def optimizer_params_are_in_range(d: Draft) -> Iterator[Problem]:
    """Parameters of an optimizer have ranges, and some optimizers have no decay."""
    kind = d.optimizer["type"]
    betas = d.optimizer["params"].get("betas", [])
    if any(not 0 <= beta < 1 for beta in betas):
        yield d.problem("optimizer.params.betas", betas, "each must be at least 0 and less than 1.",
                        "Write betas: [0.9, 0.95]")  # fmt: skip
    if kind == "sm3" and d.weight_decay and d.given("weight_decay"):
        yield d.problem("weight_decay", d.weight_decay, "optimizer sm3 has no decay.", "Set weight_decay: 0")


def moments_are_adams(d: Draft) -> Iterator[Problem]:
    """Only our own Adam keeps its moments in bf16."""
    kind = d.optimizer["type"]
    if d.moments_dtype == "bf16" and kind not in ("adam", "adamw", "cpu_torch_adam"):
        why = f"optimizer {kind} does not keep its state in it."
        yield d.problem("moments_dtype", "bf16", why, 'Set moments_dtype: fp32, or optimizer.type to "adam".')


def backward_updates_at_once(d: Draft) -> Iterator[Problem]:
    """A weight that changes in the backward pass waits for no other micro-batch, and for no norm of all gradients."""
    if not d.optimizer_in_backward:
        return
    if d.values.get("engine") == "deepspeed":
        why = "engine = deepspeed: DeepSpeed updates weights when all gradients are reduced."
        yield d.problem("optimizer_in_backward", True, why, "Set engine: auto, or remove optimizer_in_backward.")
    if d.gradient_accumulation_steps > 1 and not d.find_micro_batch_size:
        why = f"gradients are kept over gradient_accumulation_steps = {d.gradient_accumulation_steps} micro-batches."
        fix = (
            "Set gradient_accumulation_steps: 1 with a larger micro-batch or a smaller train_batch_size, or remove it."
        )
        yield d.problem("optimizer_in_backward", True, why, fix)
    if d.gradient_clipping > 0:
        why = f"gradient_clipping = {d.gradient_clipping:g} needs the norm of all gradients before the first update."
        yield d.problem(
            "optimizer_in_backward", True, why, "Set gradient_clipping: 0, or remove optimizer_in_backward."
        )
    if d.find_micro_batch_size:
        why = "the micro-batch is the whole batch under it, so that there is nothing to find."
        fix = "Set train_micro_batch_size_per_gpu to a number."
        yield d.problem("optimizer_in_backward", True, why, fix)


def combinations_are_allowed(d: Draft) -> Iterator[Problem]:
    """The table of combinations says what goes together."""
    for refusal in combinations.refusals(d.values, d.wrong):
        yield d.problem(refusal.key, refusal.value, refusal.why, refusal.fix)


def engine_decides_alone(d: Draft) -> Iterator[Problem]:
    """deepspeed_extra_args holds only what no other key decides."""
    for name, value in (d.deepspeed_extra_args or {}).items():
        if name in keys.fields() or name in ("gradient_clipping", "steps_per_print", "optimizer", "scheduler"):
            yield d.problem(f"deepspeed_extra_args.{name}", value, "a key of its own decides it.",
                            f"Write {name} outside deepspeed_extra_args.")  # fmt: skip
        elif keys.status(name) == "refused" and not keys.is_neutral(name, value):
            yield d.problem(f"deepspeed_extra_args.{name}", value, keys.REFUSED[name].reason, keys.REFUSED[name].fix)


def saving_needs_a_time(d: Draft) -> Iterator[Problem]:
    """`save` without a time to save loses the run."""
    if d.save and not (d.checkpoint_factor or d.extra_save_iters or d.checkpoint_interval_minutes):
        yield d.problem("save", d.save, "nothing says when to save.", "Add checkpoint_factor: 1000")
    if d.checkpoint_factor is None:
        return
    if d.checkpoint_scale == "log" and d.checkpoint_factor <= 1:
        why = "log-spaced saves are at its powers, so it must be more than 1."
        yield d.problem("checkpoint_factor", d.checkpoint_factor, why, "Set checkpoint_factor: 2")
    if d.checkpoint_scale == "linear" and (d.checkpoint_factor % 1 or d.checkpoint_factor < 1):
        why = "it is a number of steps, so it must be whole."
        fix = f"Set checkpoint_factor: {max(1, round(d.checkpoint_factor))}"
        yield d.problem("checkpoint_factor", d.checkpoint_factor, why, fix)


def copies_go_to_a_url(d: Draft) -> Iterator[Problem]:
    """`s3_path` is another place than `save`, and names an object store."""
    if d.s3_path and "://" not in d.s3_path:
        yield d.problem("s3_path", d.s3_path, "it is no URL.", f"Write s3_path: s3://{d.s3_path.strip('/')}")
    elif d.s3_path and d.save and d.s3_path.rstrip("/") == d.save.rstrip("/"):
        yield d.problem("s3_path", d.s3_path, "the checkpoints are saved there already.", "Remove s3_path.")


def steps_are_not_negative(d: Draft) -> Iterator[Problem]:
    """Saves happen at steps from 0."""
    if d.extra_save_iters and min(d.extra_save_iters) < 0:
        yield d.problem("extra_save_iters", d.extra_save_iters, "a step is 0 or more.", "Remove the negative ones.")


def addresses_hold_no_password(d: Draft) -> Iterator[Problem]:
    """A config is saved with each checkpoint, where anyone may read it."""
    if d.wandb_host and "@" in d.wandb_host:
        why = "a user's name and password do not belong into an address, which is saved with the run."
        yield Problem("wandb_host", why, "Log in once with `wandb login --host <address>`.", d.where("wandb_host"))


def spike_guard_can_act(d: Draft) -> Iterator[Problem]:
    """A guard watches something, its window holds what it waits for, and there is something to go back to."""
    if d.spike_guard is None:
        return
    guard = SpikeGuard(**d.spike_guard)
    if guard.warmup_steps > guard.window:
        why = f"spike_guard.window = {guard.window} never holds that many steps."
        fix = f"Set spike_guard.window to {guard.warmup_steps} or more, or warmup_steps to {guard.window} or less."
        yield d.problem("spike_guard.warmup_steps", guard.warmup_steps, why, fix)
    if guard.loss_deviations == 0 and guard.grad_norm_multiple == 0:
        why = "it watches neither the loss nor the gradient norm."
        yield d.problem("spike_guard.loss_deviations", 0, why, "Set it to 8.0, or grad_norm_multiple to 10.0.")
    if guard.action == "rollback" and d.save is None:
        why = "there is no checkpoint to go back to, since `save` is not set."
        yield d.problem("spike_guard.action", "rollback", why, "Set save to a folder, or write action: skip.")
    if guard.action == "rollback" and (d.no_save_optim or d.no_load_optim):
        key = "no_save_optim" if d.no_save_optim else "no_load_optim"
        why = f"it goes back with the optimizer's state, which {key} leaves out."
        yield d.problem("spike_guard.action", "rollback", why, f"Remove {key}, or write action: skip.")


RULES: tuple[Rule, ...] = (
    heads_divide_hidden, kv_heads_divide_heads, heads_divide_over_processes, sequence_divides_over_processes,
    mlp_divides_over_processes, tokens_divide_over_processes, context_parallel_attention, stages_have_layers,
    recomputed_whole_or_in_part, rotary_is_even, positions_cover_sequence, one_mlp_width, attention_pattern_fits,
    tied_norm_needs_parallel_residual, fused_gelu_needs_gelu, split_is_possible,
    one_source_of_data, lists_match, one_length_of_training, learning_rate_is_a_range, one_schedule_on_resume,
    optimizer_params_are_in_range, moments_are_adams, backward_updates_at_once, combinations_are_allowed,
    engine_decides_alone, saving_needs_a_time, copies_go_to_a_url, steps_are_not_negative,
    addresses_hold_no_password,
    float8_reaches_a_layer, engine_can_run, wall_time_is_a_duration,
    spike_guard_can_act,
)  # fmt: skip
