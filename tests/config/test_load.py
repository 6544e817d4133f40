"""Files and overrides together, as the command line gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.load import launcher_config, load_config, read
from megatron.errors import ConfigError

MODEL = """\
num-layers: 2
hidden_size: 8
num_attention_heads: 2
seq_length: 8
max_position_embeddings: 8
optimizer:
  type: Adam
  params:
    lr: 1e-3
    betas: [0.9, 0.95]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.yml").write_text(MODEL)
    (tmp_path / "setup.json").write_text('{"train-batch-size": 8, "num_gpus": 2, "master-port": 6000}')
    return tmp_path


def failure(folder: Path, *names: str, overrides: object = None, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(names, folder, overrides, world_size)  # type: ignore[arg-type]
    return str(caught.value).replace(f"{folder}/", "")


def test_several_files_are_merged(folder: Path) -> None:
    config = load_config(["model", "setup.json"], folder, world_size=2)
    assert config.model.num_layers == 2
    assert config.batch.train_batch_size == 8
    assert config.batch.train_micro_batch_size_per_gpu == 4
    assert config.optimizer.optimizer["params"]["lr"] == 1e-3


def test_problems_of_all_kinds_and_files_come_together_in_order(folder: Path) -> None:
    (folder / "bad.yml").write_text("\nnum_layers: 3\nnonsense: 1\nhidden_dropout: 2\n")
    said = failure(folder, "model", "bad", "nowhere", overrides=["min_lr=x"]).splitlines()
    assert [line.split(": ")[0] for line in said] == [
        "--set min_lr=x",
        "bad.yml:2",
        "bad.yml:3",
        "bad.yml:4",
        "nowhere",
    ]
    assert "num_layers: it is already set at model.yml:1." in said[1]


def test_a_nested_value_has_its_own_line(folder: Path) -> None:
    (folder / "model.yml").write_text(MODEL.replace("1e-3", "fast"))
    assert failure(folder, "model") == (
        'model.yml:9: optimizer.params.lr = "fast": it must be a number. Write a number for optimizer.params.lr.'
    )


def test_overrides_take_the_place_of_a_file(folder: Path) -> None:
    texts = ["num-layers=6", "optimizer.params.lr=3e-4", "clip_grad=0.5", "fp16.loss_scale=128", "save=null"]
    config = load_config(["model"], folder, texts)
    assert config.model.num_layers == 6
    assert config.optimizer.optimizer["params"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8}
    assert config.optimizer.gradient_clipping == 0.5
    assert config.deepspeed.fp16 == {"loss_scale": 128.0, "enabled": False}


def test_an_alias_on_the_command_line_overrides_too(folder: Path) -> None:
    assert load_config(["model"], folder, ["lr=0.5"]).optimizer.optimizer["params"]["lr"] == 0.5


def test_the_last_override_wins(folder: Path) -> None:
    assert load_config(["model"], folder, ["seed=5", "seed=6"]).numerics.seed == 6


def test_flags_of_their_own_are_strings_as_given(folder: Path) -> None:
    config = load_config(["model"], folder, {"wandb_group": "1e3", "iteration": 5})
    assert config.monitor.wandb_group == "1e3"
    assert config.checkpoint.iteration == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "--set: seed: an override is a key and a value. Write --set key=value"),
        ("=3", "--set: =3: an override is a key and a value."),
        ("seed=x", '--set seed=x: seed = "x": it must be a whole number.'),
        ("optimizer.params.lr=x", '--set optimizer.params.lr=x: optimizer.params.lr = "x": it must be a number.'),
        ("optimizer.parms.lr=1", "--set optimizer.parms.lr=1: optimizer.parms = "),
        ("seeed=1", "--set seeed=1: seeed = 1: there is no such key. Did you mean seed?"),
        ("wandb_api_key=hunter2", "--set wandb_api_key=...: wandb_api_key: a secret does not belong"),
    ],
)
def test_a_wrong_override(folder: Path, text: str, said: str) -> None:
    message = failure(folder, "model", overrides=[text])
    assert said in message
    assert "hunter2" not in message


def test_the_launcher_is_known_before_the_batch_fits(folder: Path) -> None:
    settings = read(["model", "setup.json"], folder, ["train_micro_batch_size_per_gpu=3"])
    launcher = launcher_config(settings)
    assert launcher.num_gpus == 2
    assert launcher.master_port == 6000
    with pytest.raises(ConfigError, match="train_batch_size = 8"):
        settings.resolve(world_size=2)


def test_a_wrong_launcher_key_is_said_at_once(folder: Path) -> None:
    settings = read(["model"], folder, ["master_port=0"])
    with pytest.raises(ConfigError, match="--set master_port=0: master_port = 0: it must be at least 1"):
        launcher_config(settings)


def test_planning_lets_the_config_decide_for_how_many_processes(folder: Path) -> None:
    assert load_config(["model"], folder, ["model_parallel_size=2"], planning=True).parallel.world_size == 2
    planned = load_config(["model"], folder, ["global_num_gpus=6"], planning=True)
    assert planned.parallel.world_size == 6
    triangle = ["train_batch_size=48", "train_micro_batch_size_per_gpu=2", "gradient_accumulation_steps=4"]
    assert load_config(["model"], folder, triangle, planning=True).parallel.world_size == 6
    assert load_config(["model"], folder, [], world_size=4, planning=True).parallel.world_size == 4


def test_notices_reach_the_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron import logs

    logs.setup()
    load_config(["model"], folder, ["steps_per_print=10"])
    said = "steps_per_print is ignored: log_interval says how often a line is printed."
    assert said in capsys.readouterr().err
    load_config(["model"], folder, ["steps_per_print=10"], announce=False)
    assert said not in capsys.readouterr().err


def test_files_are_kept_as_they_were_written(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yml").write_text(f"# of {folder}\n", encoding="utf-8")
    texts = read([tmp_path / "a" / "x.yml", tmp_path / "b" / "x.yml"]).texts()
    assert list(texts.values()) == ["# of a\n", "# of b\n"]
    assert "x.yml" in texts
    assert all("/" not in name for name in texts)


def test_the_same_file_given_twice_is_one_problem(folder: Path) -> None:
    said = failure(folder, "model", "../" + folder.name + "/model.yml", "model", overrides=["seed=x"]).splitlines()
    assert len(said) == 3
    assert said[0].startswith("--set seed=x: seed")
    assert all(line.endswith("model.yml: the file is given twice. Name it once.") for line in said[1:])
