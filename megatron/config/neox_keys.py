"""GPT-NeoX's keys that are not keys of the schema, in three tables: aliases, ignored, refused.

Every one of GPT-NeoX's names (commit ea7aefd8) is either a field of the schema or stands here; a test with the
whole list keeps that true. `keys.py` is how the rest of the package asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OWN_KEYS = frozenset(
    {
        "activation_fusion", "async_save", "attention_backend", "check_in_seconds", "check_replicas_interval",
        "checkpoint_first_layers",
        "checkpoint_interval_minutes", "checkpoint_operations", "compile", "context_parallel_method",
        "context_parallel_size", "cross_entropy_fusion", "cuda_graphs", "data_index_dir", "engine",
        "find_micro_batch_size", "fp8_fusion", "hang_timeout_minutes", "max_wall_time", "moments_dtype",
        "most_not_finite", "neox_compat",
        "offload_activations", "optimizer_fusion", "optimizer_in_backward", "requeue_exit_code", "resume", "run_name",
        "runs_dir", "slurm_requeue", "slurm_stop_minutes", "spike_guard", "wsd_decay_fraction", "wsd_decay_shape",
    }
)  # fmt: skip
"""Keys of the schema that GPT-NeoX does not have; every other key is one of its names."""

ALIASES: dict[str, str] = {
    # another name of a key, or of an entry of a block
    "use_flashattn_swiglu": "activation_fusion",
    "batch_size": "train_micro_batch_size_per_gpu",
    "clip_grad": "gradient_clipping",
    "lr": "optimizer.params.lr",
    "optimizer_type": "optimizer.type",
    "zero_stage": "zero_optimization.stage",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "loss_scale": "fp16.loss_scale",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_scale": "fp16.min_loss_scale",
}

IMPLIED: dict[str, dict[str, Any]] = {
    # a switch that stands for other keys where it is true
    "deepspeed_slurm": {"launcher": "slurm", "force_multi": True},
    "deepspeed_mpi": {"launcher": "openmpi", "force_multi": True},
    "checkpoint_in_cpu": {"offload_activations": True},
}

_COMPUTED = "it is computed by the program; a value in a file has no effect"
_DEAD = "nothing in GPT-NeoX reads it either"
_KERNELS = "the fastest kernel that fits the machine is chosen by itself, and all compute the same function"
_RECOMPUTE = "blocks are recomputed one by one where checkpoint_activations is true; it changes no number"
_RANDOM = "random numbers are a function of seed and step, so there is no generator state to save or load"

IGNORED: dict[str, str] = {
    **dict.fromkeys(
        (
            "is_pipe_parallel",
            "local_rank",
            "rank",
            "user_script",
            "do_train",
            "do_valid",
            "do_test",
            "config_files",
            "padded_vocab_size",
            "tokenizer",
            "tensorboard_writer",
            "comet_experiment",
            "adlr_autoresume_object",
            "dynamic_loss_scale",
            "git_hash",
        ),
        _COMPUTED,
    ),
    **dict.fromkeys(
        ("short_seq_prob", "adlr_autoresume_interval", "deepscale_config", "mup_attn_temp", "mup_output_temp"), _DEAD
    ),
    "fused_kernels_build_path": _KERNELS,
    **dict.fromkeys(
        (
            "partition_activations",
            "contiguous_checkpointing",
            "synchronize_each_layer",
            "deepspeed_activation_checkpointing",
        ),
        _RECOMPUTE,
    ),
    **dict.fromkeys(("no_save_rng", "no_load_rng"), _RANDOM),
    "use_cpu_initialization": "weights are always drawn in full and then cut, so they never depend on the layout",
    "rotary_save_freqs_buffer": "rotary frequencies are computed from rotary_emb_base; checkpoints never hold them",
    "onnx_safe": "gelu is the erf form unless bias_gelu_fusion asks for the tanh form",
    "attention_softmax_in_fp32": "the softmax of attention is always computed in fp32",
    "distributed_backend": "processes talk through nccl on GPUs and through gloo on CPUs",
    "lazy_mpu_init": "process groups are always made at the start",
    "log_dir": "messages go to stdout and stderr, metrics and the loss plot to <runs_dir>/<run_name>",
    "steps_per_print": "log_interval says how often a line is printed",
}


@dataclass(frozen=True)
class Refusal:
    """A key that is accepted only with a value that asks for nothing.

    neutral: GPT-NeoX's default; None, empty and `{enabled: false}` are neutral as well.
    reason: why another value cannot be honoured.
    fix: what to write instead.
    """

    neutral: Any
    reason: str
    fix: str = "Remove the key."


def _refuse(reason: str, fix: str = "Remove the key.", **neutral: Any) -> dict[str, Refusal]:
    return {key: Refusal(value, reason, fix) for key, value in neutral.items()}


def _refuse_all(names: str, reason: str, fix: str = "Remove the key.") -> dict[str, Refusal]:
    return {key: Refusal(None, reason, fix) for key in names.split()}


_MOE = "mixture-of-experts layers are not built in this version."
_TE = "TransformerEngine layers are not built in this version."
_FP8 = "it never ran in GPT-NeoX; precision: fp8 scales each tensor by its values of the moment, without a history."
_MAMBA = "Mamba layers are not built in this version."
_RWKV = "RWKV layers are not built in this version."
_MUP = "muP is not built in this version, and training without it would use other learning rates."
_PAIRS = "pairwise data (DPO, reward models) is not built in this version."
_REWARD = "reward data (KTO) is not built in this version."
_OBJECTIVE = "only next-token training (train_impl: normal) is built in this version."
_ONLINE = "online sample servers are not built in this version."
_PER_TENSOR = "only the norm of the whole gradient is logged (before and after clipping) in this version."
_NOISE = "the gradient noise scale is not measured in this version."
_PROFILE = "profiling is not built in this version."
_REMOVED = "DeepSpeed 0.19 no longer has it."
_OWN_CHECKPOINTS = "checkpoints are in this library's own format, which DeepSpeed does not write."
_EVALUATION = "the evaluation harness is not built in this version."

REFUSED: dict[str, Refusal] = {
    **_refuse(
        _MOE,
        moe_num_experts=1, moe_expert_interval=1, moe_top_k=1, moe_router_type="sinkhorn", moe_lbl_in_fp32=False,
        moe_jitter_eps=None,
    ),
    **_refuse(
        _TE,
        "Remove the key; the plain layers compute the same function.",
        te_columnparallel=False, te_rowparallel=False, te_layernorm_mlp=False, te_mha=False,
    ),
    **_refuse(
        _FP8,
        "Remove the key and set precision: fp8",
        te_fp8_format="hybrid", te_fp8_wgrad=True, te_fp8_amax_history_len=1, te_fp8_amax_compute_algo="most_recent",
        te_fp8_margin=0,
    ),
    "te_fp8_mha": Refusal(False, "attention is computed in bf16 under precision: fp8."),
    **_refuse(
        _MAMBA,
        mamba_selective_scan_fusion=False, mamba_causal_conv_fusion=False, mamba_inner_func_fusion=False,
        mamba_selective_fp32_params=True, mamba_use_bias_in_conv=True, mamba_use_bias_in_linears=False,
    ),
    **_refuse_all("dim_att head_size ffn_dim", _RWKV),
    **_refuse(
        _MUP,
        use_mup=False, coord_check=False, save_base_shapes=False, base_shapes_file=None, mup_init_scale=1.0,
        mup_embedding_mult=1.0, mup_width_scale=2,
    ),
    **_refuse_all(
        "pos_train_data_paths neg_train_data_paths pos_train_label_data_paths neg_train_label_data_paths "
        "pos_valid_data_paths neg_valid_data_paths pos_valid_label_data_paths neg_valid_label_data_paths "
        "pos_test_data_paths neg_test_data_paths pos_test_label_data_paths neg_test_label_data_paths",
        _PAIRS,
        "For supervised fine-tuning use train_data_paths with train_label_data_paths.",
    ),
    **_refuse_all("train_reward_data_paths valid_reward_data_paths test_reward_data_paths", _REWARD),
    **_refuse(
        _OBJECTIVE,
        train_impl="normal", dataset_impl="gpt2", dpo_fp32=True, dpo_reference_free=False, dpo_beta=0.1,
        kto_fp32=True, kto_desirable_weight=1.0, kto_undesirable_weight=1.0, kto_beta=0.1, z_loss=0.0,
        fp32_reinforce=True, kl_impl="mse", kl_div_beta=0.1, reinforce_leave_one_out=False,
        precompute_model_name=None,
    ),
    **_refuse(
        _ONLINE,
        serve_model_weights=False, weight_server_port=6000, online_dataserver_ips="localhost",
        online_dataserver_ports=10000,
    ),
    **_refuse(
        _PER_TENSOR,
        log_grad_pct_zeros=False, log_param_norm=False, log_grad_norm=False, log_optimizer_states=False,
    ),
    **_refuse(
        _NOISE,
        log_gradient_noise_scale=False, gradient_noise_scale_n_batches=5, gradient_noise_scale_cpu_offload=False,
    ),
    **_refuse(
        _PROFILE,
        profile=False, profile_step_start=10, profile_step_stop=12, memory_profiling=False,
        memory_profiling_path=None, profile_backward=False,
    ),
    **_refuse(_EVALUATION, eval_tasks=None, eval_results_prefix=""),
    "sparsity_config": Refusal(None, "block-sparse attention is not built in this version."),
    "sparse_attention": Refusal(None, f"block-sparse attention is not built in this version, and {_REMOVED}"),
    "gmlp_attn_dim": Refusal(64, "gMLP blocks are not built in this version."),
    "num_unique_layers": Refusal(None, "layers shared as in ALBERT are not built in this version."),
    "param_sharing_style": Refusal("grouped", "layers shared as in ALBERT are not built in this version."),
    "soft_prompt_tuning": Refusal(None, "soft prompts are not built in this version."),
    "output_layer_parallelism": Refusal("column", "the head is always split over the vocabulary."),
    "fp16_lm_cross_entropy": Refusal(False, "the loss is always computed in fp32; in fp16 it loses small gradients."),
    "use_bnb_optimizer": Refusal(False, "8-bit optimizers are not built in this version.", "Use optimizer.type: adam."),
    "checkpoint_validation_with_forward_pass": Refusal(
        False, "a checkpoint's files are verified by their hashes when it is written and loaded, which needs no model."
    ),
    "wandb_init_all_ranks": Refusal(False, "rank 0 alone logs; its numbers are over all ranks."),
    "use_shared_fs": Refusal(
        True,
        "rank 0 writes the indices of large data sets, and all ranks read them.",
        "Set data_index_dir to a folder that all machines share.",
    ),
    "return_logits": Refusal(False, "samples are written without logits in this version."),
    "adlr_autoresume": Refusal(False, "GPT-NeoX never used it.", "Set resume: auto."),
    "deepscale": Refusal(False, "GPT-NeoX never used it."),
    "deepspeed": Refusal(True, "the training engine is DeepSpeed."),
    "scheduler": Refusal(
        None,
        "the learning rate is ours to set.",
        "Set lr_decay_style, warmup, lr_decay_iters and min_lr instead.",
    ),
    "sparse_gradients": Refusal(False, _REMOVED),
    "amp": Refusal(None, _REMOVED, "Set precision: bf16 or precision: fp16."),
    "elasticity": Refusal(None, _REMOVED, "Resume on any number of GPUs needs no setting: load and start."),
    "compression_training": Refusal(None, _REMOVED),
    "curriculum_learning": Refusal(None, "sequence-length curricula are not built in this version."),
    "curriculum_seqlen": Refusal(0, "sequence-length curricula are not built in this version."),
    "data_efficiency": Refusal(None, "batches come from this library's own loader, which DeepSpeed does not see."),
    "autotuning": Refusal(None, "DeepSpeed's autotuner is not used.", "Set the batch sizes yourself."),
    "autotuning_run": Refusal(None, "DeepSpeed's autotuner is not used.", "Set the batch sizes yourself."),
    "activation_checkpointing": Refusal(
        None, "recomputation is this library's own.", "Set checkpoint_activations and checkpoint_num_layers."
    ),
    "checkpoint": Refusal(None, _OWN_CHECKPOINTS, "Set save, load and checkpoint_factor."),
    "tensorboard": Refusal(None, "DeepSpeed's monitor is not used.", "Set tensorboard_dir: runs/tensorboard"),
    "wandb": Refusal(None, "DeepSpeed's monitor is not used.", "Set use_wandb: true and wandb_project."),
    "csv_monitor": Refusal(None, "metrics are always written to runs/<run_name>/metrics.jsonl."),
}  # fmt: skip

RENAMED: dict[str, str] = {
    # names that are not GPT-NeoX's today, but that its older files, its documentation or other libraries use
    "gas": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "train_micro_batch_size": "train_micro_batch_size_per_gpu",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "global_batch_size": "train_batch_size",
    "save_interval": "checkpoint_factor",
    "attention_type": "attention_config",
    "warmup_iters": "warmup",
    "warmup_ratio": "warmup",
    "decay_lr_to": "min_lr",
    "learning_rate": "optimizer.params.lr",
    "max_steps": "train_iters",
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads",
    "rope_theta": "rotary_emb_base",
    "tie_word_embeddings": "no_weight_tying",
    "max_seq_len": "seq_length",
    "block_size": "seq_length",
    "tensor_parallel_size": "model_parallel_size",
    "pipeline_parallel_size": "pipe_parallel_size",
    "train_data_path": "train_data_paths",
    "label_data_paths": "train_label_data_paths",
    "tokenizer_file": "vocab_file",
    "dropout": "hidden_dropout",
    "num_epochs": "train_epochs",
    "max_grad_norm": "gradient_clipping",
    "zero_allow_untested_optimizer": "deepspeed_extra_args",
}
