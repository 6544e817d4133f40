"""Rules across keys: the message of each, and that a good config breaks none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import readiness, rules
from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.resolve import resolve, resolve_settings
from megatron.config.yaml_reader import Setting
from tests.config.small import SMALL, problems

CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"engine": "local", "pipe_parallel_size": 2, "world": 2},
        'engine = "local": pipe_parallel_size = 2 is DeepSpeed\'s pipeline. Set engine: auto',
    ),
    (
        {"num_attention_heads": 5},
        "num_attention_heads = 5: hidden_size = 48 cannot be divided among it (48 % 5 = 3). Set "
        "num_attention_heads to 2, 3, 4 or 6.",
    ),
    (
        {"num_kv_heads": 3},
        "num_kv_heads = 3: num_attention_heads = 4 is not a multiple of it. Set num_kv_heads to 1, 2 or",
    ),
    (
        {"num_attention_heads": 12, "model_parallel_size": 8, "world": 8},
        "num_attention_heads = 12: it cannot be split over model_parallel_size = 8 (12 % 8 = 4). Set "
        "model_parallel_size to 1, 2, 3, 4, 6 or 12.",
    ),
    (
        {"num_kv_heads": 2, "model_parallel_size": 4, "world": 4},
        "num_kv_heads = 2: it cannot be split over model_parallel_size = 4 (2 % 4 = 2). Set "
        "model_parallel_size to 1 or 2.",
    ),
    (
        {"activation": "swiglu", "model_parallel_size": 2, "world": 2, "hidden_size": 32},
        "intermediate_size = null: the MLP has 43 features in each branch, which cannot be split over "
        "model_parallel_size = 2. Set mlp_multiple_of to a multiple of 2, which rounds the width up, or",
    ),
    (
        {"sequence_parallel": True, "model_parallel_size": 2, "world": 2, "seq_length": 15},
        "seq_length = 15: sequence_parallel splits it over model_parallel_size = 2 (15 % 2 > 0). Set seq_length to 16,",
    ),
    (
        {"pipe_parallel_size": 5, "world": 5},
        "pipe_parallel_size = 5: each stage needs a layer, and num_layers = 4. Set pipe_parallel_size to 4 or less.",
    ),
    (
        {"checkpoint_activations": True, "checkpoint_operations": ["attention"], "checkpoint_num_layers": 2},
        "checkpoint_num_layers = 2: checkpoint_operations recomputes parts of blocks, and never several blocks "
        "together.",
    ),
    (
        {"pipe_partition_method": "layers"},
        'pipe_partition_method = "layers": there is no such method. Set pipe_partition_method: parameters (or uniform',
    ),
    (
        {"pipe_partition_method": "type:(mlp"},
        'pipe_partition_method = "type:(mlp": it is no regular expression: missing ), unterminated subpattern',
    ),
    (
        {"context_parallel_size": 3, "world": 3},
        "seq_length = 16: context_parallel_size = 3 cuts it into 6 chunks (16 % 6 = 4). Set seq_length to 12 or 18, or",
    ),
    (
        {"context_parallel_size": 2, "attention_dropout": 0.1, "world": 2},
        "attention_dropout = 0.1: context_parallel_method = ring (context_parallel_size = 2) cannot apply it. Set "
        "context_parallel_method: all_to_all, or attention_dropout: 0.",
    ),
    (
        {"context_parallel_size": 2, "pos_emb": "rpe", "world": 2},
        'pos_emb = "rpe": context_parallel_method = ring (context_parallel_size = 2) cannot apply it.',
    ),
    (
        {"context_parallel_size": 2, "context_parallel_method": "all_to_all", "num_kv_heads": 1, "world": 2},
        "num_kv_heads = 1 cannot be split over context_parallel_size = 2 x model_parallel_size = 1. Set "
        "context_parallel_method: ring",
    ),
    (
        {"pos_emb": "rotary", "rotary_pct": 0.25},
        "rotary_pct = 0.25: int(0.25 x 12 features per head) = 3 features cannot be rotated in pairs. Set "
        "rotary_pct to",
    ),
    (
        {"seq_length": 32},
        "max_position_embeddings = 16: it is less than seq_length = 32. Set max_position_embeddings to 32 or more.",
    ),
    (
        {"intermediate_size": 96, "expansion_factor": 2},
        "intermediate_size = 96: expansion_factor = 2 sets the MLP's width as well. Keep one of the two.",
    ),
    ({"attention_config": ["global"]}, "it names 1 layers, and num_layers is 4."),
    ({"attention_config": [[["global", "mamba"], "all"]]}, "mamba is not built in this version"),
    ({"attention_config": [[["global", "local"], "all"]]}, "sliding_window_width tokens, which is not set"),
    ({"attention_config": [[["global"] * 3, "all"]]}, "its 3 names do not divide num_layers = 4."),
    ({"attention_config": [[["global"], -1]]}, '-1 is neither a positive number of repeats nor "all".'),
    ({"gpt_j_tied": True}, "gpt_j_tied = true: it has no meaning without gpt_j_residual."),
    ({"bias_gelu_fusion": True, "activation": "relu"}, "it is the tanh form of gelu, and activation is relu."),
    ({"split": "90,a"}, 'split = "90,a": it is not a list of numbers divided by comma or slash.'),
    ({"split": "1,2,3,4"}, "it has 4 shares; there are three: training, validation, test."),
    ({"split": "-1,2"}, "a share cannot be negative or infinite."),
    (
        {"split": "0,0,0"},
        'its first share is 0, which leaves nothing to train on. Write three shares such as split: "969, 30, 1"',
    ),
    ({"split": "0,1"}, "its first share is 0"),
    ({"split": ""}, "it is not a list of numbers"),
    ({"data_path": "a", "train_data_paths": ["b"]}, 'data_path = "a": train_data_paths names data too.'),
    ({"valid_data_paths": ["b"]}, "train_data_paths is not set. Add train_data_paths: [prefix]"),
    ({"data_path": "a,b"}, 'data_path = "a,b": it is one prefix, not a list. Write train_data_paths: [a, b]'),
    (
        {"train_data_paths": ["a", "b"], "train_data_weights": [1.0]},
        "train_data_weights = [1.0]: it has 1 entries, and train_data_paths has 2. Give one entry for each data set.",
    ),
    ({"train_label_data_paths": ["a"]}, "it has 1 entries, and train_data_paths has 0."),
    ({"train_data_paths": ["a"], "train_data_weights": [-1.0]}, "it holds a weight that is not a positive number."),
    (
        {"train_data_paths": ["a"], "train_data_weights": [1.0], "weight_by_num_documents": True},
        "weight_by_num_documents derives the weights from document counts. Keep one of the two.",
    ),
    ({"train_iters": 5, "train_epochs": 1}, "train_epochs = 1: train_iters = 5 says how long training runs too."),
    (
        {"train_epochs": 1, "train_data_paths": ["a", "b"], "train_data_weights": [0.3, 0.7]},
        "train_epochs = 1: it counts passes over every training data set, but they have different weights.",
    ),
    (
        {"min_lr": 0.01},
        "min_lr = 0.01: it is more than the peak, optimizer.params.lr = 0.001. Set min_lr to 0.001 or less (a tenth, "
        "0.0001, is usual).",
    ),
    ({"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "lr_decay_iters = 5 sets the horizon as well."),
    (
        {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
        "use_checkpoint_lr_scheduler = true asks for",
    ),
    ({"lr_decay_style": "wsd", "warmup": 0.5, "wsd_decay_fraction": 0.6}, "there is no room for both"),
    (
        {"optimizer": {"type": "lion", "params": {"lr": 1, "eps": 1e-8}}},
        "optimizer.params.eps = 1e-08: optimizer lion does not take it. Remove it; lion takes lr or betas.",
    ),
    (
        {"optimizer": {"type": "adam", "params": {"lr": 1, "beta": [0.9]}}},
        "optimizer.params.beta = [0.9]: optimizer adam does not take it. Did you mean betas? adam takes lr, "
        "betas or eps.",
    ),
    (
        {"optimizer": {"type": "adam", "params": {"lr": 1, "betas": [0.9, 1]}}},
        "each must be at least 0 and less than 1.",
    ),
    (
        {"optimizer": {"type": "lion", "params": {"lr": 1e-3}}, "moments_dtype": "bf16"},
        'moments_dtype = "bf16": optimizer lion does not keep its state in it.',
    ),
    (
        {"optimizer_in_backward": True, "gradient_clipping": 0.0, "gradient_accumulation_steps": 2},
        "optimizer_in_backward = true: gradients are kept over gradient_accumulation_steps = 2 micro-batches.",
    ),
    ({"optimizer_in_backward": True}, "gradient_clipping = 1 needs the norm of all gradients before the first update."),
    (
        {"train_micro_batch_size_per_gpu": "auto"},
        'train_micro_batch_size_per_gpu = "auto": the largest that fits keeps train_batch_size, which is not set. Set',
    ),
    (
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 8, "gradient_accumulation_steps": 2},
        "gradient_accumulation_steps = 2: it follows from the micro-batch that is found",
    ),
    (
        {"find_micro_batch_size": True, "train_batch_size": 8, "gradient_accumulation_steps": 2},
        "gradient_accumulation_steps = 2: it follows from the micro-batch that is found, and find_micro_batch_size is",
    ),
    (
        {"find_micro_batch_size": True, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2},
        "train_micro_batch_size_per_gpu = 2: it is what is to be found, since find_micro_batch_size is true.",
    ),
    ({"find_micro_batch_size": True}, "find_micro_batch_size = true: the largest that fits keeps train_batch_size"),
    (
        {"find_micro_batch_size": False, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": 8},
        "find_micro_batch_size = false: train_micro_batch_size_per_gpu is auto, which asks for it.",
    ),
    (
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 3, "world": 2},
        "train_batch_size = 3: it is not a multiple of",
    ),
    (
        {"zero_optimization": {"stage": 3}, "pipe_parallel_size": 2, "world": 2},
        "zero_optimization.stage = 3: it does not go with pipe_parallel_size = 2: DeepSpeed cannot shard",
    ),
    ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "DeepSpeed 0.19.8 hands over wrong masters"),
    ({"deepspeed_extra_args": {"gradient_clipping": 2}}, "Write gradient_clipping outside deepspeed_extra_args."),
    ({"deepspeed_extra_args": {"amp": {"enabled": True}}}, "deepspeed_extra_args.amp = "),
    (
        {"max_wall_time": "1:30"},
        'max_wall_time = "1:30": it is none of minutes as a number, or "HH:MM:SS" or "D-HH:MM:SS"',
    ),
    ({"max_wall_time": 0}, 'max_wall_time = 0: it must be more than 0. Write max_wall_time: "4:00:00" for four hours'),
    ({"save": "x"}, 'save = "x": nothing says when to save. Add checkpoint_factor: 1000'),
    ({"s3_path": "bucket/run"}, 's3_path = "bucket/run": it is no URL. Write s3_path: s3://bucket/run'),
    (
        {"save": "s3://b/run", "checkpoint_factor": 1, "s3_path": "s3://b/run/"},
        "the checkpoints are saved there already. Remove s3_path",
    ),
    ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, "so it must be more than 1. Set checkpoint_factor: 2"),
    ({"checkpoint_factor": 1.5}, "it is a number of steps, so it must be whole. Set checkpoint_factor: 2"),
    ({"wandb_host": "https://me:pass@host"}, "wandb_host: a user's name and password do not belong into an address"),
    (
        {"precision": "fp8", "hidden_size": 40},
        'precision = "fp8": float8 products come in multiples of 16 features, and hidden_size = 40 is none. Set '
        "hidden_size to 32 or 48, or precision: bf16",
    ),
    (
        {"precision": "fp8", "hidden_size": 32, "intermediate_size": 36, "model_parallel_size": 4, "world": 4},
        "no linear layer's share of model_parallel_size = 4 is so wide: query_key_value [24, 32], dense [32, 8], "
        "linear1 [9, 32], linear2 [32, 9]. Use fewer tensor parallel processes, or set precision: bf16",
    ),
    (
        {"spike_guard": {"action": "skip", "window": 20}},
        "spike_guard.warmup_steps = 50: spike_guard.window = 20 never holds that many steps. Set spike_guard.window to",
    ),
    ({"spike_guard": {"action": "skip", "loss_deviations": 0}}, "it watches neither the loss nor the gradient norm."),
    ({"spike_guard": {"action": "rollback"}}, 'spike_guard.action = "rollback": there is no checkpoint to go back to'),
    (
        {"spike_guard": {"action": "rollback"}, "save": "x", "checkpoint_factor": 9, "no_save_optim": True},
        "it goes back with the optimizer's state, which no_save_optim leaves out. Remove no_save_optim",
    ),
    ({"extra_save_iters": [0, -1]}, "a step is 0 or more. Remove the negative ones."),
]


@pytest.mark.parametrize(("keys", "said"), CASES, ids=[str(case[0])[:40] for case in CASES])
def test_what_cannot_stand(keys: dict[str, Any], said: str) -> None:
    message = problems(**keys)
    assert said in message
    assert len(message.splitlines()) == 1


def test_every_rule_is_tested_by_a_case() -> None:
    """Without any one rule, some case would pass unnoticed."""
    from megatron.config.draft import Draft, UnavailableError

    found = set()
    original = rules.RULES

    def noted(rule: Any) -> Any:
        def wrapper(draft: Draft) -> Any:
            try:
                result = list(rule(draft))
            except UnavailableError:
                result = []
            if result:
                found.add(rule.__name__)
            return iter(result)

        return wrapper

    try:
        rules.RULES = tuple(noted(rule) for rule in original)
        for keys, _ in CASES:
            problems(**dict(keys))
    finally:
        rules.RULES = original
    assert found == {rule.__name__ for rule in original}


def test_layers_that_fp8_does_not_reach_are_said() -> None:
    settings = {key: Setting(value) for key, value in {**SMALL, "intermediate_size": 40}.items()}
    settings["precision"] = Setting("fp8", "a.yml:7")
    assert resolve_settings(settings).notices == (
        "a.yml:7: precision: fp8 leaves linear1 [40, 48], linear2 [48, 40] in bf16: float8 products come in multiples "
        "of 16 features.",
    )
    settings["intermediate_size"] = Setting(64)
    assert resolve_settings(settings).notices == ()


def test_fp8_stands_with_a_bf16_block_and_not_with_an_fp16_one() -> None:
    config = resolve({**SMALL, "precision": "fp8", "bf16": {"enabled": True}})
    assert (config.numerics.precision, config.numerics.weight_precision) == ("fp8", "bf16")
    assert deepspeed_config(config)["bf16"]["enabled"] is True
    assert deepspeed_config(config)["fp16"]["enabled"] is False
    assert "it asks for fp16, but precision for fp8" in problems(precision="fp8", fp16={"enabled": True})
    assert resolve({**SMALL, "precision": "float8"}).numerics.precision == "fp8"


def test_settings_without_effect_are_said() -> None:
    settings = {key: Setting(value) for key, value in SMALL.items()}
    settings["rotary_pct"] = Setting(0.5, "a.yml:7")
    notices = resolve_settings(settings).notices
    assert notices == ("a.yml:7: rotary_pct has no effect without pos_emb: rotary.",)


@pytest.mark.parametrize(
    ("key", "value", "size"),
    [
        ("context_parallel_method", "all_to_all", "context_parallel_size"),
        ("sequence_parallel", True, "model_parallel_size"),
        ("fp32_allreduce", True, "model_parallel_size"),
        ("pipe_partition_method", "uniform", "pipe_parallel_size"),
    ],
)
def test_ways_of_sharing_need_somebody_to_share_with(key: str, value: object, size: str) -> None:
    settings = {name: Setting(each) for name, each in {**SMALL, key: value}.items()}
    assert resolve_settings(settings).notices == (f"{key} has no effect without {size}: 2 or more.",)


@pytest.mark.parametrize("key", ["wall_clock_breakdown", "dump_state"])
def test_what_is_said_to_deepspeed_has_no_effect_on_our_own_engine(key: str) -> None:
    settings = {name: Setting(each) for name, each in {**SMALL, "zero_optimization": {"stage": 1}, key: True}.items()}
    assert resolve_settings(settings).notices == (f"{key} has no effect without engine: deepspeed.",)
    settings["engine"] = Setting("deepspeed")
    assert resolve_settings(settings).notices == ()


def test_ignored_keys_are_said_with_their_reason() -> None:
    settings = {key: Setting(value) for key, value in SMALL.items()}
    settings["steps_per_print"] = Setting(10, "a.yml:3")
    notices = resolve_settings(settings).notices
    assert notices == ("a.yml:3: steps_per_print is ignored: log_interval says how often a line is printed.",)


def test_one_stage_and_every_zero_stage_run() -> None:
    for stage in range(4):
        assert not readiness.runnable(
            resolve({**SMALL, "pipe_parallel_size": 1, "zero_optimization": {"stage": stage}})
        )


def test_what_training_needs() -> None:
    found = [problem.what for problem in readiness.trainable(resolve(SMALL))]
    assert found == ["train_iters", "data_path", "vocab_file", "merge_file"]
    complete = {"train_iters": 1, "data_path": "x", "tokenizer_type": "CharLevelTokenizer"}
    assert readiness.trainable(resolve({**SMALL, **complete})) == []


def test_what_does_nothing_useful_is_said() -> None:
    values = {**SMALL, "train_iters": 100, "extra_save_iters": [0, 100, 101, 500], "num_workers": 100_000}
    settings = {key: Setting(value, "a.yml:2") for key, value in values.items()}
    assert resolve_settings(settings).notices == (
        "a.yml:2: extra_save_iters: 101, 500 is beyond the end, train_iters = 100.",
        "a.yml:2: num_workers = 100000 is more threads for each rank than read ahead faster; 2 to 8 are enough.",
    )
    usual = {**SMALL, "train_iters": 100, "extra_save_iters": [0, 100], "num_workers": 64}
    assert resolve_settings({key: Setting(value) for key, value in usual.items()}).notices == ()


def test_one_process_is_one() -> None:
    assert "1 process cannot be divided into groups of 2." in problems(model_parallel_size=2)


def test_a_micro_batch_that_is_to_be_found_survives_a_round_trip() -> None:
    config = resolve({**SMALL, "find_micro_batch_size": True, "train_batch_size": 8})
    assert config.flat()["train_micro_batch_size_per_gpu"] is None
    assert resolve(config.flat()) == config
