"""GPT-NeoX's own files load as they are: their keys and values, written down as its users have them.

Sources: the configs of GPT-NeoX at ea7aefd8. Values that differ between the models of the ladder are filled in.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.load import read
from megatron.config.schema.config import Config
from megatron.errors import ConfigError

LADDER = """{
  "pipe_parallel_size": 1, "model_parallel_size": 1,
  "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
  "seq_length": 2048, "max_position_embeddings": 2048, "norm": "layernorm", "pos_emb": "rotary",
  "no_weight_tying": true, "gpt_j_residual": false, "output_layer_parallelism": "column",
  "scaled_upper_triang_masked_softmax_fusion": false, "bias_gelu_fusion": false, "rope_fusion": false,
  "layernorm_fusion": false,
  "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8,}},
  "min_lr": 0.00006,
  "zero_optimization": {
    "stage": 1, "allgather_partitions": True, "allgather_bucket_size": 500000000, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": 500000000, "contiguous_gradients": True,
  },
  "train_micro_batch_size_per_gpu": 4, "data_impl": "mmap",
  "checkpoint_activations": true, "checkpoint_num_layers": 1, "partition_activations": true,
  "synchronize_each_layer": true,
  "gradient_clipping": 1.0, "weight_decay": 0.1, "hidden_dropout": 0.0, "attention_dropout": 0.0,
  "fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
  "train_iters": 320000, "lr_decay_iters": 320000, "distributed_backend": "nccl", "lr_decay_style": "cosine",
  "warmup": 0.01, "checkpoint_factor": 10000, "eval_interval": 1000, "eval_iters": 10,
  "log_interval": 100, "steps_per_print": 10, "keep_last_n_checkpoints": 4, "wall_clock_breakdown": true,
"""
FILES = {
    "125M": LADDER + "}",
    "125M-json": LADDER + '"hostfile": "/mock_path"}',
    "20B": """{
  "tokenizer_type": "HFTokenizer", "vocab-file": "./20B_checkpoints/20B_tokenizer.json",
  "save": "./20B_checkpoints", "load": "./20B_checkpoints",
  "data-path": "./data/pile_20B_tokenizer/pile_20B_tokenizer_text_document",
  "pipe-parallel-size": 4, "model-parallel-size": 2,
  "num-layers": 44, "hidden-size": 6144, "num-attention-heads": 64, "seq-length": 2048,
  "max-position-embeddings": 2048, "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25,
  "no-weight-tying": true, "gpt_j_residual": true, "output_layer_parallelism": "column",
  "scaled-upper-triang-masked-softmax-fusion": true, "bias-gelu-fusion": true,
  "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.97e-4, "betas": [0.9, 0.95], "eps": 1.0e-8,}},
  "min_lr": 0.97e-5,
  "zero_optimization": {
    "stage": 1, "allgather_partitions": True, "allgather_bucket_size": 1260000000, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": 1260000000, "contiguous_gradients": True,
  },
  "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 32, "data-impl": "mmap", "split": "995,4,1",
  "checkpoint-activations": true, "checkpoint-num-layers": 1, "partition-activations": false,
  "synchronize-each-layer": true,
  "gradient_clipping": 1.0, "weight-decay": 0.01, "hidden-dropout": 0, "attention-dropout": 0,
  "fp16": {
    "fp16": true, "enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12,
    "hysteresis": 2, "min_loss_scale": 1
  },
  "train-iters": 150000, "lr-decay-iters": 150000, "distributed-backend": "nccl", "lr-decay-style": "cosine",
  "warmup": 0.01, "checkpoint-factor": 500, "eval-interval": 1000, "eval-iters": 10,
  "log-interval": 2, "steps_per_print": 2, "wall_clock_breakdown": false,
  "tensorboard-dir": "./tensorboard", "log-dir": "./logs",
}""",
    "pythia/14M": """{
  "pipe-parallel-size": 0, "model-parallel-size": 1,
  "num-layers": 6, "hidden-size": 128, "num-attention-heads": 4, "seq-length": 2048, "max-position-embeddings": 2048,
  "pos-emb": "rotary", "rotary-pct": 0.25, "no-weight-tying": true, "gpt-j-residual": true,
  "output-layer-parallelism": "column", "attention-config": [[["flash"], 6]],
  "scaled-upper-triang-masked-softmax-fusion": true, "bias-gelu-fusion": true,
  "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1.0e-8}}, "min_lr": 0.0001,
  "zero_optimization": {
    "stage": 0, "allgather_partitions": true, "allgather_bucket_size": 50000000, "overlap_comm": true,
    "reduce_scatter": true, "reduce_bucket_size": 50000000, "contiguous_gradients": true, "cpu_offload": false
  },
  "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 1, "data-impl": "mmap", "num_workers": 4,
  "checkpoint-activations": false, "checkpoint-num-layers": 1, "partition-activations": false,
  "synchronize-each-layer": true,
  "gradient_clipping": 1.0, "weight-decay": 0.1, "hidden-dropout": 0, "attention-dropout": 0,
  "fp16": {
    "fp16": true, "enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12,
    "hysteresis": 2, "min_loss_scale": 1
  },
  "train-iters": 143000, "lr-decay-iters": 143000, "distributed-backend": "nccl", "lr-decay-style": "cosine",
  "warmup": 0.01, "checkpoint-factor": 1000, "extra-save-iters": [0,1,2,4,8,16,32,64,128,256,512],
  "eval-interval": 100000, "eval-iters": 10,
  "log-interval": 10, "steps_per_print": 10, "wall_clock_breakdown": true, "tokenizer-type": "HFTokenizer",
}""",
    "bf16_125M": LADDER.replace(
        '"fp16": {"enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},',
        '"precision": "bfloat16", "fp32_allreduce": True, "data_types": {"grad_accum_dtype": "fp32"},',
    )
    + "}",
    "19M": LADDER
    + """"num_workers": 1, "deepspeed_extra_args": {
    "comms_logger": {"enabled": true, "verbose": true, "prof_all": true, "debug": false},
  }}""",
    "slurm_125M": LADDER + '"launcher": "slurm", "deepspeed_slurm": true, "comment": "neox"}',
    "llama2/7B": """{
  "pipe_parallel_size": 1, "model_parallel_size": 1, "make_vocab_size_divisible_by": 1,
  "num_layers": 32, "hidden_size": 4096, "intermediate_size": 32768, "num_attention_heads": 32,
  "seq_length": 4096, "max_position_embeddings": 4096, "pos_emb": "rotary", "rotary_pct": 1,
  "no_weight_tying": true, "gpt_j_residual": false, "output_layer_parallelism": "column", "norm": "rmsnorm",
  "rms_norm_epsilon": 1.0e-5, "scaled_upper_triang_masked_softmax_fusion": true, "bias_gelu_fusion": false,
  "use_bias_in_norms": false, "use_bias_in_attn_linear": false, "activation": "swiglu", "mlp_multiple_of": 256,
}""",
    "mistral/7B": """{
  "pipe_parallel_size": 1, "model_parallel_size": 1, "make_vocab_size_divisible_by": 1,
  "num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_kv_heads": 8,
  "seq_length": 8192, "sliding_window_width": 4096, "max_position_embeddings": 131072, "pos_emb": "rotary",
  "rotary_pct": 1, "rotary_emb_base": 10000, "no_weight_tying": true, "gpt_j_residual": false,
  "output_layer_parallelism": "column", "norm": "rmsnorm", "rms_norm_epsilon": 1.0e-5,
  "attention_config": [[["flash"], 32]], "scaled_upper_triang_masked_softmax_fusion": true,
  "bias_gelu_fusion": false, "use_bias_in_norms": false, "use_bias_in_attn_linear": false, "activation": "swiglu",
}""",
    "finetuning_configs/6-9B": LADDER
    + '"finetune": true, "load": "/path/to/checkpoint", "tokenizer_type": "HFTokenizer"}',
}
FRAGMENTS = {
    "local_setup": """{
  "data_path": "data/enwik8/enwik8_text_document", "vocab_file": "data/gpt2-vocab.json",
  "merge_file": "data/gpt2-merges.txt", "save": "checkpoints", "load": "checkpoints",
  "checkpoint_validation_with_forward_pass": False, "tensorboard_dir": "tensorboard", "log_dir": "logs",
}""",
    "local_setup_wandb": """{
  "data_path": "data/enwik8/enwik8_text_document", "vocab_file": "data/gpt2-vocab.json",
  "merge_file": "data/gpt2-merges.txt", "save": "checkpoints", "load": "checkpoints",
  "checkpoint_validation_with_forward_pass": False, "tensorboard_dir": "tensorboard", "log_dir": "logs",
  "use_wandb": True, "wandb_host": "https://api.wandb.ai", "wandb_project": "neox"
}""",
    "local_setup_comet": """{
  "data_path": "data/enwik8/enwik8_text_document", "vocab_file": "data/gpt2-vocab.json",
  "merge_file": "data/gpt2-merges.txt", "save": "checkpoints", "load": "checkpoints",
  "checkpoint_validation_with_forward_pass": False, "tensorboard_dir": "tensorboard", "log_dir": "logs",
  "use_comet": True, "comet_workspace": "test_workspace", "comet_project": "test_project",
  "comet_experiment_name": "test_experiment", "comet_tags": ["test_tag1", "test_tag2"],
  "comet_others": {"test_others"},
}""",
    "slurm_local": """{
  "data-path": "data/enwik8/enwik8_text_document", "vocab-file": "data/gpt2-vocab.json",
  "merge-file": "data/gpt2-merges.txt", "save": "checkpoints", "checkpoint_validation_with_forward_pass": false,
  "tensorboard-dir": "tensorboard", "log-dir": "logs", "use_wandb": true, "wandb_host": "https://api.wandb.ai",
  "wandb_project": "neox"
}""",
    "eleutherai_cluster": """{
  "train-data-paths": ["/mnt/pile_text_document"], "valid-data-paths": ["/mnt/pile_val_text_document"],
  "test-data-paths": ["/mnt/pile_test_text_document"], "tokenizer_type": "HFTokenizer",
  "vocab-file": "/mnt/20B_tokenizer.json", "save": "/mnt/checkpoints", "load": "/mnt/checkpoints",
  "checkpoint_validation_with_forward_pass": False, "tensorboard-dir": "/mnt/tensorboard", "log-dir": "/mnt/logs",
  "wandb_team": "eleutherai", "wandb_project": "pythia"
}""",
    "docker/pythia-paths": """{
  "train-data-paths": ["/home/data/pile"], "valid-data-paths": ["/home/data/pile"],
  "test-data-paths": ["/home/data/pile"], "tokenizer-type": "HFTokenizer", "vocab-file": "/home/20B_tokenizer.json",
  "save": "/home/chk/", "load": "/home/chk/", "checkpoint_validation_with_forward_pass": False
}""",
    "text_generation": """{
  "text_gen_type": "unconditional", "maximum_tokens": 102, "prompt_end": "\\n", "temperature": 1.0, "top_p": 0.0,
  "top_k": 0, "recompute": false, "num_samples": 10, "sample_input_file": "sample_input.txt",
  "sample_output_file": "sample_output.txt",
}""",
    "cpu_mock_config": '{"global_num_gpus": 1}',
    "llama/train_config": """{
  "finetune": true, "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.9, 0.95], "eps":  1.0e-8,}},
  "min_lr": 0.00002, "override_lr_scheduler": true,
  "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_scatter": True},
  "train_micro_batch_size_per_gpu": 4, "data_impl": "mmap", "train_iters": 320000, "lr_decay_iters": 320000,
  "distributed_backend": "nccl", "lr_decay_style": "cosine", "warmup": 0.01, "checkpoint_factor": 10000,
  "log_interval": 100, "steps_per_print": 10, "keep_last_n_checkpoints": 4, "wall_clock_breakdown": true,
}""",
}
REFUSED = {
    # what changes numbers, or cannot be honoured: (text, the keys that are named)
    "125M-dmoe": (
        LADDER + '"moe_num_experts": 8, "moe_expert_interval": 2}',
        ["moe_num_experts", "moe_expert_interval"],
    ),
    "bnb_125M": (LADDER + '"use_bnb_optimizer": true}', ["use_bnb_optimizer"]),
    "1-3B-transformer-engine": (LADDER + '"te_layernorm_mlp": true, "te_mha": true}', ["te_layernorm_mlp", "te_mha"]),
    "prof": (LADDER + '"profile": true, "memory_profiling": true}', ["profile", "memory_profiling"]),
    "sparse": (LADDER + '"sparsity_config": {"block": 16, "num_local_blocks": 32,}}', ["sparsity_config"]),
}


def load(folder: Path, **texts: str) -> tuple[Config, str]:
    """Return the config of some texts as files, and its notices."""
    for name, text in texts.items():
        (folder / f"{name}.yml").write_text(text)
    resolution = read(list(texts), folder).resolve(planning=True)
    return resolution.config, "\n".join(resolution.notices).replace(f"{folder}/", "")


@pytest.mark.parametrize("name", list(FILES))
def test_a_model_of_gpt_neox_loads(tmp_path: Path, name: str) -> None:
    config, _ = load(tmp_path, model=FILES[name])
    assert f'"num{"-" if "-layers" in FILES[name] else "_"}layers": {config.model.num_layers},' in FILES[name]


def test_a_block_among_deepspeed_s_extra_arguments_is_the_key_of_its_name(tmp_path: Path) -> None:
    config, _ = load(tmp_path, model=FILES["19M"])
    assert config.deepspeed.comms_logger == {"enabled": True, "verbose": True, "prof_all": True, "debug": False}
    assert config.deepspeed.deepspeed_extra_args is None


@pytest.mark.parametrize("name", list(FRAGMENTS))
def test_a_fragment_of_gpt_neox_loads_beside_a_model(tmp_path: Path, name: str) -> None:
    model = FILES["llama2/7B" if "llama" in name else "125M"]
    _, notices = load(tmp_path, model=model, fragment=FRAGMENTS[name])
    if "log_dir" in FRAGMENTS[name].replace("-", "_"):
        assert (
            "log_dir is ignored: messages go to stdout and stderr, metrics and the loss plot to <runs_dir>/" in notices
        )


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_changes_numbers_or_cannot_be_done(tmp_path: Path, name: str) -> None:
    text, keys = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, model=text)
    assert [problem.what.split(" = ")[0] for problem in caught.value.problems] == keys
