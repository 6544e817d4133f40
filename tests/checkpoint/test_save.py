"""Saving and reading back: bitwise, whole, for every dtype and any partition."""

from __future__ import annotations

import json
import random

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.config.load import load_config
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import ShardSpec, StatePiece
from tests.checkpoint.states import all_dtypes, make_state, same_bits, scattered, shares, small_config, whole
from tests.ranks import run_ranks

MESH = Mesh.single()


def save(root, state, iteration=10, **keys):
    progress = {"iteration": iteration, "consumed_samples": 4 * iteration}
    return save_checkpoint(root, iteration, whole(state), progress, small_config(**keys), {}, MESH)


def assert_same(reader, state):
    assert sorted((n, k) for k in reader.kinds for n in reader.names(k)) == sorted(state)
    for (name, kind), tensor in state.items():
        assert same_bits(reader.read(name, kind), tensor), (name, kind)


def test_random_partitions_round_trip_bitwise_for_all_dtypes(tmp_path):
    for seed in range(3):
        state = all_dtypes(seed)
        (pieces,) = scattered(state, 1, random.Random(seed))
        folder = save_checkpoint(tmp_path, seed, pieces, {}, small_config(), {}, MESH)
        reader = CheckpointReader(folder)
        reader.verify()
        assert_same(reader, state)


def test_two_ranks_write_one_checkpoint(tmp_path):
    state = all_dtypes(7)
    owned = scattered(state, 2, random.Random(7))

    def work():
        mesh = Mesh.create()
        save_checkpoint(tmp_path, 3, owned[mesh.world.rank], {"iteration": 3}, small_config(), {}, mesh)

    run_ranks(2, work)
    reader = CheckpointReader(find_checkpoint(tmp_path))
    reader.verify()
    assert sorted(reader.manifest.files) == ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert reader.manifest.topology["dp"] == 2
    assert_same(reader, state)


@pytest.mark.parametrize("spec", [ShardSpec(0), ShardSpec(1), ShardSpec(0, blocks=2)])
def test_tensor_parallel_shares_are_merged(tmp_path, spec):
    full = torch.randn(8, 4)
    folder = save_checkpoint(tmp_path, 1, shares("w", full, 2, spec), {}, small_config(), {}, MESH)
    assert same_bits(CheckpointReader(folder).read("w"), full)


def test_the_files_are_plain_safetensors(tmp_path):
    state = make_state()
    folder = save(tmp_path, state)
    tensors = load_file(folder / "rank_00000.safetensors")
    assert torch.equal(tensors["weight/layers.0.mlp.linear1.bias/0"], state["layers.0.mlp.linear1.bias", "weight"])


def test_the_manifest_says_what_the_run_was(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    config = small_config(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer))
    record = {"name": "HFTokenizer", "fingerprint": "ab"}
    extra = {"tokenizer": record, "config_files": {"a.yml": "x: 1\n"}, "loss": 2.5, "epochs": {10: 1, 9: 2}}
    folder = save_checkpoint(tmp_path / "run", 5, whole(make_state()), {"consumed_samples": 20}, config, extra, MESH)
    manifest = CheckpointReader(folder).manifest
    assert manifest.iteration == 5
    assert manifest.progress == {"consumed_samples": 20}
    assert manifest.config["model"]["hidden_size"] == 8
    assert manifest.tokenizer == {**record, "files": {"vocab_file": "tokenizer/tokenizer.json"}}
    assert manifest.extra == {"loss": 2.5, "epochs": {"10": 1, "9": 2}}  # whatever json makes of it, it is proved
    assert manifest.versions["torch"].startswith("2.")
    assert (folder / "configs" / "a.yml").read_text() == "x: 1\n"
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert yaml.safe_load((folder / "config.yml").read_text())["num_layers"] == 2
    assert (tmp_path / "run" / "latest").read_text() == "global_step5"


def test_config_yml_is_the_config_again(tmp_path):
    config = small_config(norm="rmsnorm", keep_last_n_checkpoints=3, gradient_accumulation_steps=4)
    folder = save_checkpoint(tmp_path, 5, whole(make_state()), {}, config, {}, MESH)
    assert load_config([folder / "config.yml"]) == config


def test_no_save_optim_leaves_only_weights(tmp_path):
    folder = save(tmp_path, make_state(), no_save_optim=True)
    assert CheckpointReader(folder).kinds == ["weight"]


def test_a_gap_in_the_pieces_is_a_bug_and_nothing_is_published(tmp_path):
    save(tmp_path, make_state())
    piece = StatePiece("w", "weight", (4,), 0, torch.zeros(3))
    with pytest.raises(AssertionError, match="pieces cover 3 of 4"):
        save_checkpoint(tmp_path, 20, [piece], {}, small_config(), {}, MESH)
    assert find_checkpoint(tmp_path).name == "global_step10"


def test_saving_an_iteration_again_replaces_it(tmp_path):
    save(tmp_path, make_state(0))
    folder = save(tmp_path, make_state(1))
    assert_same(CheckpointReader(folder), make_state(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step10", "latest"]


def test_a_replacement_cut_off_half_way_leaves_the_earlier_one_loadable(tmp_path):
    folder = save(tmp_path, make_state(0))
    folder.rename(tmp_path / ".replaced_global_step10")
    assert_same(CheckpointReader(find_checkpoint(tmp_path)), make_state(0))
    save(tmp_path, make_state(1), iteration=11)
    assert_same(CheckpointReader(find_checkpoint(tmp_path, 10)), make_state(0))


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".writing_global_step7").mkdir()
    (tmp_path / ".writing_global_step7" / "rank_00000.safetensors").write_bytes(b"half")
    save(tmp_path, make_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step10", "latest"]


def test_the_manifest_is_json_without_pickles(tmp_path):
    folder = save(tmp_path, make_state())
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["config.yml", "manifest.json", "rank_00000.safetensors"]
