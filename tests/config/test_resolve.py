"""Flat keys -> Config: canonical values, precision, types, and what is said of each mistake."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.resolve import resolve
from megatron.errors import ConfigError
from tests.config.small import SMALL, problems


def config(**keys: Any) -> Any:
    return resolve({**SMALL, **keys})


def test_a_config_resolves_to_itself() -> None:
    first = resolve({**SMALL, "precision": "bfloat16", "fp16": {"loss_scale": 0}, "lr": 1e-3}, world_size=4)
    assert resolve(first.flat()) == first
    assert first.parallel.world_size == 4
    assert first.batch.train_batch_size == 4


def test_a_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        config().model.num_layers = 3


@pytest.mark.parametrize(
    ("key", "given", "stored"),
    [
        ("pos_emb", "Rotary", "rotary"),
        ("lr_decay_style", "COSINE", "cosine"),
        ("tokenizer_type", "hftokenizer", "HFTokenizer"),
        ("precision", "BFloat16", "bf16"),
        ("precision", "FP16", "fp16"),
        ("checkpoint_scale", "Log", "log"),
        ("text_gen_type", "INPUT-FILE", "input-file"),
        ("min_lr", 0, 0.0),
        ("train_iters", 1e3, 1000),
        ("extra_save_iters", [1.0, 2], [1, 2]),
        ("train_micro_batch_size_per_gpu", None, 1),
        ("seed", None, 1234),
        ("use_wandb", None, None),
        ("communication_data_type", "bfloat16", "bf16"),
    ],
)
def test_values_are_stored_in_one_form(key: str, given: object, stored: object) -> None:
    keys: dict[str, Any] = {key: given}
    if key == "checkpoint_scale":
        keys["checkpoint_factor"] = 2
    value = config(**keys).flat()[key]
    assert value == stored
    assert type(value) is type(stored)


def test_dashes_equal_underscores() -> None:
    flat = {key.replace("_", "-"): value for key, value in SMALL.items()}
    assert resolve(flat) == resolve(SMALL)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"fp16": True, "loss_scale": 0}}, "fp16"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bf16"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"fp16": {"loss_scale": 0}}, "fp32"),
        ({"precision": "fp16", "fp16": {"initial_scale_power": 12}}, "fp16"),
        ({"precision": "bfloat16", "bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"bf16": {"enabled": False}, "precision": "fp32"}, "fp32"),
    ],
)
def test_precision_comes_from_the_key_or_a_block(keys: dict[str, Any], precision: str) -> None:
    resolved = config(**keys)
    assert resolved.numerics.precision == precision
    if resolved.deepspeed.fp16 is not None:
        assert resolved.deepspeed.fp16["enabled"] == (precision == "fp16")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"precision": "bf16", "fp16": {"enabled": True}},
            "fp16.enabled = true: it asks for fp16, but precision for bf16. Keep one of the two: precision: fp16, or "
            "precision: bf16",
        ),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            "bf16.enabled = true: it asks for bf16, but fp16.enabled for fp16.",
        ),
        ({"precision": "fp16", "fp16": {"enabled": False}}, "fp16.enabled = false: precision is fp16."),
    ],
)
def test_contradicting_precisions(keys: dict[str, Any], said: str) -> None:
    assert said in problems(**keys)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "hidden_size",
            "48",
            'hidden_size = "48": it must be a whole number. Write it without quotes: hidden_size: 48',
        ),
        ("hidden_size", 48.5, "hidden_size = 48.5: it must be a whole number. Write hidden_size: 48"),
        ("num_layers", True, "num_layers = true: it must be a whole number. Write a number: num_layers: 1"),
        ("hidden_dropout", True, "hidden_dropout = true: it must be a number. Write a number: hidden_dropout: 1"),
        ("min_lr", "1e-5", 'min_lr = "1e-5": it must be a number. Write it without quotes: min_lr: 1e-5'),
        ("num_layers", 0, "num_layers = 0: it must be at least 1. Set num_layers to 1 or more."),
        ("hidden_dropout", 1.0, "hidden_dropout = 1.0: it must be less than 1. Set hidden_dropout to less than 1."),
        ("rotary_pct", 1.5, "rotary_pct = 1.5: it must be at most 1. Set rotary_pct to 1 or less."),
        ("finetune", 1, "finetune = 1: it must be true or false. Write finetune: true"),
        ("finetune", "true", 'finetune = "true": it must be true or false. Write it without quotes: finetune: true'),
        ("vocab_file", 3, 'vocab_file = 3: it must be a string. Write it with quotes: vocab_file: "3"'),
        (
            "train_data_paths",
            "a, b",
            'train_data_paths = "a, b": it must be a list. Write train_data_paths: [a, b]',
        ),
        ("min_lr", float("nan"), "it must be a finite number."),
        ("norm", "rmsnrm", 'norm = "rmsnrm": it is none of layernorm, rmsnorm, non_parametric_layernorm, scalenorm. '),
        ("norm", "rmsnrm", "Write norm: rmsnorm"),
        ("norm", "te_layernorm", "Write norm: layernorm, which computes the same function."),
        ("data_impl", "cached", "make mmap files with tools/preprocess_data.py"),
        ("zero_optimization", {"stage": 4}, "zero_optimization.stage = 4: it is none of 0, 1, 2, 3."),
        ("zero_optimization", {"stge": 1}, "zero_optimization.stge = 1: there is no such entry. Did you mean stage?"),
        ("zero_optimization", 1, "zero_optimization = 1: it must be a mapping."),
        (
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "gpu"}},
            'zero_optimization.offload_optimizer.device = "gpu": it is none of none, cpu, nvme.',
        ),
        ("fp16", {"loss_scale": -1}, "fp16.loss_scale = -1: it must be at least 0."),
        (
            "optimizer",
            {"type": "Adam", "params": {"lr": "1e-4"}},
            'optimizer.params.lr = "1e-4": it must be a number. Write it without quotes: optimizer.params.lr: 1e-4',
        ),
        ("optimizer", {"type": "Adam"}, "optimizer.params: it must be set. Add optimizer.params: {lr: 6.0e-4"),
        ("optimizer", {"params": {}}, "optimizer.params.lr: it must be set. Add optimizer.params.lr: 6.0e-4"),
        ("optimizer", {"type": "adamm", "params": {"lr": 1}}, "Write optimizer.type: adam"),
        ("seed", 0, "seed = 0: it must be at least 1."),
        ("global_num_gpus", "8", 'global_num_gpus = "8": it must be a whole number of GPUs.'),
    ],
)
def test_a_wrong_value(key: str, value: object, said: str) -> None:
    assert said in problems(**{key: value})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("num_layer", "num_layer = 1: there is no such key. Did you mean num_layers?"),
        ("gas", "gas = 1: there is no such key. The key is gradient_accumulation_steps."),
        ("learning_rate", "The key is optimizer.params.lr."),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("qqq", "qqq = 1: there is no such key. docs/configuration.md lists every key."),
    ],
)
def test_an_unknown_key(key: str, said: str) -> None:
    assert said in problems(**{key: 1})


@pytest.mark.parametrize("missing", list(SMALL))
def test_a_required_key(missing: str) -> None:
    flat = {key: value for key, value in SMALL.items() if key != missing}
    with pytest.raises(ConfigError, match=f"{missing}: it must be set"):
        resolve(flat)


def test_no_model_at_all_is_one_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"seed": 3})
    assert len(caught.value.problems) == 1
    assert "no file describes a model. Give a model's file as well, such as configs/125M.yml." in str(caught.value)


def test_all_problems_are_reported_at_once_and_none_twice() -> None:
    said = problems(
        hidden_size="x", nonsense=1, moe_num_experts=8, split="a", min_lr=2.0, precision="fp17", seq_length=32
    ).splitlines()
    assert len(said) == 7
    for key in (
        "hidden_size",
        "nonsense",
        "moe_num_experts",
        "split",
        "min_lr",
        "precision",
        "max_position_embeddings",
    ):
        assert sum(line.startswith(f"{key} = ") for line in said) == 1, key


@pytest.mark.parametrize("key", ["wandb_api_key", "COMET_API_KEY", "hf_token", "s3_secret"])
def test_secrets_are_refused_and_not_repeated(key: str) -> None:
    said = problems(**{key: "abcdef123"})
    assert "Export it in the environment (WANDB_API_KEY, COMET_API_KEY)" in said
    assert "abcdef123" not in said


def test_secrets_inside_a_block_are_refused() -> None:
    said = problems(comet_others={"deep": {"api_key": "abcdef123"}})
    assert said.startswith("comet_others.deep.api_key: a secret does not belong")
    assert "abcdef123" not in said


def test_aliases_take_their_proper_name() -> None:
    resolved = config(lr=3e-4, clip_grad=0.5, zero_stage=2, batch_size=3, loss_scale_window=500, optimizer_type="Lion")
    assert resolved.optimizer.optimizer == {"type": "lion", "params": {"lr": 3e-4}}
    assert resolved.optimizer.gradient_clipping == 0.5
    assert resolved.parallel.zero_optimization == {"stage": 2}
    assert resolved.batch.train_micro_batch_size_per_gpu == 3
    assert resolved.deepspeed.fp16 == {"loss_scale_window": 500, "enabled": False}


def test_an_alias_may_repeat_but_not_contradict() -> None:
    block = {"type": "adam", "params": {"lr": 1e-3}}
    assert config(lr=1e-3, optimizer=block) == config(optimizer=block)
    said = problems(lr=2e-3, optimizer=block)
    assert (
        said == "lr = 0.002: it is another name of optimizer.params.lr, which is 0.001. Keep optimizer.params.lr alone."
    )


def test_slurm_switch_stands_for_its_launcher() -> None:
    launcher = config(deepspeed_slurm=True).launcher
    assert launcher.launcher == "slurm"
    assert launcher.force_multi is True
    assert config(deepspeed_slurm=False).launcher == config().launcher
    assert "deepspeed_mpi = 1: it must be true or false." in problems(deepspeed_mpi=1)


def test_adam_is_written_out() -> None:
    assert config().optimizer.optimizer == {"type": "adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}}
    block = {"type": "Adam", "params": {"lr": 1, "betas": [0.9, 0.95], "weight_decay": 0.3}}
    optimizer = config(optimizer=block).optimizer
    assert optimizer.optimizer["params"] == {"lr": 1.0, "betas": [0.9, 0.95], "eps": 1e-8}
    assert optimizer.weight_decay == 0.3


def test_a_decay_in_two_places() -> None:
    block = {"type": "Adam", "params": {"lr": 1, "weight_decay": 0.3}}
    assert config(optimizer=block, weight_decay=0.3).optimizer.weight_decay == 0.3
    said = problems(optimizer=block, weight_decay=0.2)
    assert "optimizer.params.weight_decay = 0.3: weight_decay = 0.2 says otherwise." in said


def test_old_offload_switch() -> None:
    zero = config(zero_optimization={"stage": 2, "cpu_offload": True}).parallel.zero_optimization
    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert config(zero_optimization={"stage": 2, "cpu_offload": False}).parallel.zero_optimization == {"stage": 2}


def test_processes_must_fit_the_layout() -> None:
    said = problems(model_parallel_size=2, world=3)
    assert said == (
        "model_parallel_size = 2: 3 processes cannot be divided into groups of 2. Start a multiple of 2 processes, or "
        "set it to 1."
    )
    said = problems(pipe_parallel_size=2, context_parallel_size=2, world=6)
    assert said == (
        "pipe_parallel_size = 2: 6 processes cannot be divided into groups of 2 x context_parallel_size (2) = 4. Start "
        "a multiple of 4 processes, or set these sizes to 1."
    )


def test_processes_that_share_a_sequence_are_not_data_parallel() -> None:
    assert resolve({**SMALL, "context_parallel_size": 2}, world_size=4).batch.train_batch_size == 2
    assert "global_num_gpus = 8: the launcher starts 2 processes." in problems(global_num_gpus=8, world=2)


def test_an_empty_name_is_none() -> None:
    checkpoint = resolve({**SMALL, "save": "", "load": "", "prompt_end": ""})
    assert (checkpoint.checkpoint.save, checkpoint.checkpoint.load) == (None, None)
    assert checkpoint.generation.prompt_end == ""
