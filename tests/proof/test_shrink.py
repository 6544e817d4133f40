"""A trial keeps what decides whether a layout is right, and makes small what costs time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import read
from megatron.config.readiness import runnable
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import ConfigError
from megatron.model.accounting import layer_types, mlp_shape
from megatron.proof.shrink import shrink

ROOT = Path(__file__).resolve().parents[2]
LARGE: dict[str, Any] = {
    "num_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "seq_length": 4096,
    "max_position_embeddings": 4096,
}
KEPT = (
    "model_parallel_size", "pipe_parallel_size", "context_parallel_size", "context_parallel_method",
    "pipe_partition_method", "sequence_parallel", "gpt_j_residual", "gpt_j_tied", "norm", "activation", "pos_emb",
    "rotary_pct", "no_weight_tying", "checkpoint_activations", "use_qk_layernorm", "use_bias_in_norms",
    "use_bias_in_attn_linear", "use_bias_in_mlp", "gradient_clipping", "weight_decay", "init_method",
)  # fmt: skip


def config(world: int = 1, **keys: Any) -> Config:
    return resolve({**LARGE, **keys}, world)


def published() -> list[Path]:
    found = []
    for file in sorted((ROOT / "configs").rglob("*.yml")):
        try:
            read([file]).resolve(planning=True)
        except ConfigError:
            continue
        found.append(file)
    return found


@pytest.mark.parametrize("file", published(), ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_published_model_has_a_small_trial(file: Path) -> None:
    whole = read([file]).resolve(planning=True).config
    trial = shrink(whole)
    theirs, ours = whole.flat(), trial.config.flat()
    assert {key: ours[key] for key in KEPT} == {key: theirs[key] for key in KEPT}
    assert ours["zero_optimization"]["stage"] == theirs["zero_optimization"].get("stage", 0)
    assert runnable(trial.config) == []
    assert trial.config.model.hidden_size <= 512
    assert trial.config.model.seq_length <= 64
    assert trial.config.model.num_layers <= max(8, whole.parallel.pipe_parallel_size)
    dp = trial.world_size // (ours["model_parallel_size"] * max(1, ours["pipe_parallel_size"]))
    assert dp == 2
    assert trial.reference.parallel.world_size == 1
    assert trial.reference.model == trial.config.model
    assert trial.reference.batch.train_batch_size == trial.config.batch.train_batch_size


def test_ratios_are_kept() -> None:
    whole = config(
        num_kv_heads=10, rotary_pct=0.25, pos_emb="rotary", activation="swiglu", intermediate_size=13824 * 3 // 2
    )
    trial = shrink(whole).config
    assert trial.model.num_attention_heads == 4 * (trial.model.num_kv_heads or 0)
    head = trial.model.hidden_size // trial.model.num_attention_heads
    assert int(head * 0.25) % 2 == 0 < int(head * 0.25) < head
    (_, small, gated), (_, large, _) = mlp_shape(trial.model), mlp_shape(whole.model)
    assert gated
    assert small / trial.model.hidden_size == pytest.approx(large / whole.model.hidden_size, rel=0.05)


def test_attention_patterns_keep_each_type() -> None:
    pattern = [[["global"], 30], [["local", "global"], 5]]
    whole = config(attention_config=pattern, sliding_window_width=512)
    trial = shrink(whole).config
    assert set(layer_types(trial.model)) == {"global", "local"}
    assert trial.model.num_layers <= 8
    assert trial.model.sliding_window_width == 2
    assert shrink(config()).config.model.attention_config is None


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_what_is_cut_divides(method: str) -> None:
    keys = {"model_parallel_size": 2, "context_parallel_size": 4, "context_parallel_method": method, "num_kv_heads": 8}
    trial = shrink(config(8, **keys, sequence_parallel=True))
    assert trial.world_size == 16
    assert trial.config.model.seq_length % 16 == 0
    assert trial.vocab_size % 2 == 0


def test_what_a_cpu_cannot_do_is_said() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    keys = {"precision": "fp16", "hidden_dropout": 0.1, "zero_optimization": zero,
            "optimizer": {"type": "cpu_adam", "params": {"lr": 1e-4}}}  # fmt: skip
    trial = shrink(config(**keys))
    assert (trial.config.numerics.precision, trial.config.numerics.hidden_dropout) == ("bf16", 0.0)
    assert [note.split(" ")[0] for note in trial.notes] == ["precision", "optimizer", "dropout"]
    on_gpu = shrink(config(**keys), on_cpu=False)
    assert on_gpu.config.numerics.precision == "fp16"
    assert (on_gpu.config.deepspeed.fp16 or {})["initial_scale_power"] == 8
    assert on_gpu.in_precision("fp32").config.numerics.precision == "fp32"


def test_shrinking_needs_no_torch() -> None:
    code = "import sys, megatron.launch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
