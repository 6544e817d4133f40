"""Every shipped file loads, and every model has the published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import readiness
from megatron.config.load import load_config, read
from megatron.config.schema.config import Config
from megatron.model.accounting import num_parameters, padded_vocab_size

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

PILE = 50277  # ids of the Pile's tokenizer; the ladder's other tokenizers pad to the same 50,304 rows
PUBLISHED: dict[str, tuple[int, int]] = {
    # file: (token ids of its tokenizer, parameters)
    "19M": (PILE, 70_426_624),
    "49M": (PILE, 113_625_600),
    "125M": (PILE, 162_322_944),
    "350M": (PILE, 405_334_016),
    "760M": (PILE, 834_493_440),
    "800M": (PILE, 1_011_781_632),
    "1-3B": (PILE, 1_414_647_808),
    "2-7B": (PILE, 2_775_208_960),
    "6-7B": (PILE, 6_856_253_440),
    "13B": (PILE, 13_100_697_600),
    "175B": (PILE, 175_197_806_592),
    "20B": (PILE, 20_554_567_680),
    "bf16_125M": (PILE, 162_322_944),
    "slurm_125M": (PILE, 162_322_944),
    "pythia/14M": (PILE, 14_067_712),
    "pythia/31M": (PILE, 30_494_720),
    "pythia/70M": (PILE, 70_426_624),
    "pythia/160M": (PILE, 162_322_944),
    "pythia/410M": (PILE, 405_334_016),
    "pythia/1B": (PILE, 1_011_781_632),
    "pythia/1-4B": (PILE, 1_414_647_808),
    "pythia/2-8B": (PILE, 2_775_208_960),
    "pythia/6-9B": (PILE, 6_857_302_016),
    "pythia/12B": (PILE, 11_846_072_320),
    "llama/7B": (32000, 6_738_415_616),
    "llama/13B": (32000, 13_015_864_320),
    "llama/30B": (32000, 32_528_943_616),
    "llama/65B": (32000, 65_285_660_672),
    "llama2/7B": (32000, 6_738_415_616),
    "llama2/13B": (32000, 13_015_864_320),
    "llama2/70B": (32000, 68_976_648_192),
    "llama2/codellama_7B": (32016, 6_738_546_688),
    "llama2/codellama_34B": (32000, 33_743_970_304),
    "mistral/7B": (32000, 7_241_732_096),
    "quickstart": (4096, 4_242_432),
}

# name: (layers, hidden, heads, peak, floor, second beta, micro-batch, accumulation, steps)
RECIPES: dict[str, tuple[int, int, int, float, float, float, int, int, int]] = {
    "19M": (6, 512, 8, 1e-3, 1e-4, 0.95, 4, 1, 143_000),
    "49M": (10, 640, 10, 8e-4, 8e-5, 0.95, 32, 1, 143_000),
    "125M": (12, 768, 12, 6e-4, 6e-5, 0.95, 4, 1, 320_000),
    "350M": (24, 1024, 16, 3e-4, 3e-5, 0.95, 4, 1, 320_000),
    "760M": (24, 1536, 16, 2.5e-4, 2.5e-5, 0.999, 4, 1, 320_000),
    "800M": (16, 2048, 8, 2.5e-4, 2.5e-5, 0.95, 16, 1, 143_000),
    "1-3B": (24, 2048, 16, 2e-4, 2e-5, 0.95, 4, 1, 320_000),
    "2-7B": (32, 2560, 32, 1.6e-4, 1.6e-5, 0.95, 4, 1, 320_000),
    "6-7B": (32, 4096, 32, 1.2e-4, 1.2e-5, 0.95, 4, 1, 320_000),
    "13B": (40, 5120, 40, 1e-4, 1e-5, 0.95, 4, 1, 320_000),
    "175B": (96, 12288, 96, 6e-5, 6e-6, 0.95, 4, 1, 320_000),
    "20B": (44, 6144, 64, 9.7e-5, 9.7e-6, 0.95, 4, 32, 150_000),
    "pythia/14M": (6, 128, 4, 1e-3, 1e-4, 0.95, 32, 1, 143_000),
    "pythia/31M": (6, 256, 8, 1e-3, 1e-4, 0.95, 32, 1, 143_000),
    "pythia/70M": (6, 512, 8, 1e-3, 1e-4, 0.95, 32, 1, 143_000),
    "pythia/160M": (12, 768, 12, 6e-4, 6e-5, 0.95, 32, 1, 143_000),
    "pythia/410M": (24, 1024, 16, 3e-4, 3e-5, 0.95, 32, 1, 143_000),
    "pythia/1B": (16, 2048, 8, 2.5e-4, 2.5e-5, 0.95, 4, 4, 143_000),
    "pythia/1-4B": (24, 2048, 16, 2e-4, 2e-5, 0.95, 16, 1, 143_000),
    "pythia/2-8B": (32, 2560, 32, 1.6e-4, 1.6e-5, 0.95, 8, 2, 143_000),
    "pythia/6-9B": (32, 4096, 32, 1.2e-4, 1.2e-5, 0.95, 8, 2, 143_000),
    "pythia/12B": (36, 5120, 40, 1.2e-4, 1.2e-5, 0.95, 8, 2, 143_000),
}

FRAGMENTS: dict[str, list[str]] = {
    # file: what it is given with
    "local_setup": ["125M"],
    "local_setup_wandb": ["125M"],
    "local_setup_comet": ["pythia/70M"],
    "text_generation": ["125M", "local_setup"],
    "slurm_local": ["125M"],
    "cpu_mock_config": ["pythia/1B"],
    "llama/train_config": ["llama/7B", "local_setup"],
}


def load(*names: str, world_size: int | None = None) -> Config:
    return load_config(names, CONFIGS, world_size=world_size, planning=world_size is None)


def test_every_file_is_tested() -> None:
    files = {str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.yml")}
    assert files == set(PUBLISHED) | set(FRAGMENTS)
    assert set(RECIPES) | {name for name in PUBLISHED if name[0] in "lmqbs"} == set(PUBLISHED)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_model_has_the_published_parameters(name: str) -> None:
    config = load(name)
    ids, parameters = PUBLISHED[name]
    rows = padded_vocab_size(ids, config.model.make_vocab_size_divisible_by, config.parallel.model_parallel_size)
    assert num_parameters(config.model, rows) == parameters


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_count_in_the_files_own_comment_is_right(name: str) -> None:
    if name in ("bf16_125M", "slurm_125M", "quickstart"):
        return
    first = (CONFIGS / f"{name}.yml").read_text().splitlines()[0]
    assert f" {PUBLISHED[name][1]:,} parameters" in f" {first}"


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_gpt_neox_s(name: str) -> None:
    config = load(name)
    params = config.optimizer.optimizer["params"]
    found = (
        config.model.num_layers,
        config.model.hidden_size,
        config.model.num_attention_heads,
        params["lr"],
        config.optimizer.min_lr,
        params["betas"][1],
        config.batch.train_micro_batch_size_per_gpu,
        config.batch.gradient_accumulation_steps,
        config.training.train_iters,
    )
    assert found == RECIPES[name]
    assert config.model.seq_length == config.model.max_position_embeddings == 2048
    assert config.optimizer.weight_decay == (0.01 if name == "20B" else 0.1)
    assert (config.optimizer.lr_decay_style, config.optimizer.warmup) == ("cosine", 0.01)
    assert config.model.no_weight_tying
    parallel = name.startswith("pythia") or name in ("20B", "49M")
    assert config.model.gpt_j_residual is parallel
    assert config.model.rotary_pct == (0.25 if parallel else 1.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("pythia")])
def test_pythia_steps_are_two_million_tokens_as_published(name: str) -> None:
    gpus = {"pythia/6-9B": 128, "pythia/12B": 256}.get(name, 64 if "B" in name else 32)
    config = load(name, world_size=gpus)
    assert config.batch.train_batch_size == 1024
    assert config.numerics.precision == ("bf16" if name == "pythia/1B" else "fp16")
    assert config.checkpoint.extra_save_iters == [0, *(2**power for power in range(10))]
    assert config.checkpoint.checkpoint_factor == 1000


def test_gpt_neox_20b_on_its_96_gpus() -> None:
    config = load("20B", world_size=96)
    assert config.batch.train_batch_size == 1536
    assert (config.parallel.pipe_parallel_size, config.parallel.model_parallel_size) == (4, 2)


@pytest.mark.parametrize("name", list(FRAGMENTS))
def test_a_fragment_loads_on_a_model(name: str) -> None:
    load(*FRAGMENTS[name], name)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("quickstart", "slurm_125M")])
def test_local_setup_goes_with_every_model(name: str) -> None:
    more = ["llama/train_config"] if name.startswith(("llama", "mistral")) else []
    config = load(name, "local_setup", *more)
    assert readiness.trainable(config) == []


def test_the_newcomers_commands_can_run() -> None:
    for names in (["quickstart"], ["125M", "local_setup"]):
        config = load(*names, world_size=1)
        assert readiness.trainable(config) == []
        assert readiness.runnable(config) == []
        assert config.numerics.precision in ("fp32", "bf16"), "fp16 does not run on a CPU"


@pytest.mark.parametrize("name", [*PUBLISHED, *FRAGMENTS])
def test_no_shipped_file_has_an_ignored_key(name: str) -> None:
    resolution = read([*FRAGMENTS.get(name, []), name], CONFIGS).resolve(planning=True)
    assert not [notice for notice in resolution.notices if "Planned for" not in notice]
