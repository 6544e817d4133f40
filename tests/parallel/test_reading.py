"""What each rank reads of a checkpoint: its part, so that all together read it about once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.hashing import CURRENT
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.engine.build import build_engine
from megatron.errors import DamagedCheckpointError
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from tests.parallel.matrix import VOCAB, make_config, make_mesh
from tests.ranks import run_ranks

MODEL = {"activation": "swiglu", "intermediate_size": 96}


def make_engine(flat: dict[str, Any], world_size: int) -> Any:
    config = make_config({**MODEL, **flat}, world_size)
    mesh = make_mesh(config)
    return build_engine(config, mesh, build_model(config, VOCAB, mesh), build_objective()), config, mesh


def save(root: Path, flat: dict[str, Any], world_size: int) -> None:
    engine, config, mesh = make_engine(flat, world_size)
    save_checkpoint(root, 1, engine.state_pieces(), {}, config, None, mesh)


def load(root: Path, flat: dict[str, Any], world_size: int) -> int:
    """Return the bytes of values that this rank reads."""
    engine, _, _ = make_engine(flat, world_size)
    reader = CheckpointReader(find_checkpoint(root))
    for name in reader.manifest.files:
        reader._pieces.prove_header(name)
    headers = reader.bytes_read
    engine.load_state(reader, with_optimizer=True)
    return reader.bytes_read - headers


LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "our engine": ({"stage": 0}, 2),
    "ZeRO 1": ({"stage": 1}, 2),
    "ZeRO 3": ({"stage": 3}, 2),
    "pipeline": ({"pipe_parallel_size": 2, "stage": 1}, 2),
    "tensor": ({"model_parallel_size": 2, "stage": 1}, 2),
    "tensor and data": ({"model_parallel_size": 2, "stage": 2}, 4),
}


@pytest.mark.parametrize("saved", [({"stage": 0}, 1), ({"model_parallel_size": 2, "stage": 1}, 2)], ids=["1", "tp2"])
def test_all_ranks_together_read_a_checkpoint_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: tuple[dict[str, Any], int]
) -> None:
    monkeypatch.setitem(CURRENT.__dict__, "block", 256)  # as small beside these tensors as 1 MiB is beside real ones
    flat, size = saved
    run_ranks(size, save, tmp_path, flat, size)
    files = CheckpointReader(find_checkpoint(tmp_path)).manifest.files.values()
    total = sum(file.size - file.header_size for file in files)
    for name, (layout, world_size) in LAYOUTS.items() if size == 1 else [("tensor", LAYOUTS["tensor"])]:
        read = run_ranks(world_size, load, tmp_path, layout, world_size)
        changes_tensor_axis = layout.get("model_parallel_size", 1) > size
        assert total <= sum(read) <= total * (1.5 if changes_tensor_axis else 1.1), name
        assert max(read) <= sum(read) * (0.7 if name == "pipeline" else 1.1 / world_size), name


def fails(root: Path, flat: dict[str, Any], world_size: int) -> str:
    engine, _, _ = make_engine(flat, world_size)
    with pytest.raises(DamagedCheckpointError) as caught:
        engine.load_state(CheckpointReader(find_checkpoint(root)), with_optimizer=True)
    return str(caught.value)


def test_damage_that_one_rank_reads_stops_all_and_is_named_on_all(tmp_path: Path) -> None:
    run_ranks(1, save, tmp_path, {"stage": 0}, 1)
    path = find_checkpoint(tmp_path).local_path("rank_00000.safetensors")
    assert path is not None
    data = bytearray(path.read_bytes())
    entry = CheckpointReader(find_checkpoint(tmp_path)).manifest.tensors["exp_avg"]["layers.1.mlp.linear2.weight"]
    data[entry.pieces[0].offset] ^= 1
    path.write_bytes(data)
    messages = run_ranks(2, fails, tmp_path, {"stage": 0}, 2)
    assert messages[0] == messages[1]
    assert "The values of exp_avg/layers.1.mlp.linear2.weight/0 do not match their hash" in messages[0]
