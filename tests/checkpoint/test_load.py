"""Loading stops, and says why and what instead."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import manifest as manifest_module
from megatron.checkpoint.compatible import require_same_model, require_shapes, require_tokenizer, stored_config
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.object_storage import ObjectStorage
from megatron.checkpoint.save import save_checkpoint, save_snapshot, take_snapshot
from megatron.checkpoint.storage import storage_of
from megatron.errors import CheckpointError, DamagedCheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.states import make_state, same_bits, small_config, whole

MESH = Mesh.single()


@pytest.fixture
def root(tmp_path):
    """A folder with the checkpoints of steps 4 and 8."""
    root = tmp_path / "run"
    for iteration in (4, 8):
        extra = {"tokenizer": {"name": "HFTokenizer", "fingerprint": "0123456789abcdef"}}
        save_checkpoint(root, iteration, whole(make_state(iteration)), {}, small_config(), extra, MESH)
    return root


def test_latest_or_the_given_iteration(root):
    assert find_checkpoint(root).name == "global_step8"
    assert find_checkpoint(root, 4).name == "global_step4"
    assert find_checkpoint(root / "global_step4") == storage_of(root / "global_step4")
    (root / "latest").unlink()
    assert find_checkpoint(root).name == "global_step8"


def test_an_iteration_that_is_not_there(root):
    with pytest.raises(CheckpointError, match=r"iteration = 5.*There are: 4, 8\. Choose one"):
        find_checkpoint(root, 5)
    with pytest.raises(CheckpointError, match=r"of another iteration.*load: .*run"):
        find_checkpoint(root / "global_step4", 8)
    (root / "latest").write_text("global_step99")
    with pytest.raises(CheckpointError, match=r"latest = 99.*There are: 4, 8"):
        find_checkpoint(root)


def test_a_folder_that_is_not_there_or_empty(root):
    with pytest.raises(CheckpointError, match=r"no such folder.*holds: run/.*Set load to .*run"):
        find_checkpoint(root.parent / "rum")
    (root.parent / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*holds: nothing"):
        find_checkpoint(root.parent / "empty")


def test_folders_of_other_programs_are_recognised(tmp_path):
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hf / name).touch()
    with pytest.raises(CheckpointError, match=r"Hugging Face model\. Import it with: .*convert.py import"):
        find_checkpoint(hf)
    neox = tmp_path / "neox" / "global_step10"
    neox.mkdir(parents=True)
    (neox / "mp_rank_00_model_states.pt").touch()
    for folder in (neox, neox.parent):
        with pytest.raises(CheckpointError, match="checkpoint of GPT-NeoX or DeepSpeed"):
            find_checkpoint(folder)


def test_a_truncated_file_is_named_with_the_checkpoint_to_use_instead(root):
    path = root / "global_step8" / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(find_checkpoint(root))
    message = str(caught.value)
    assert f"{path}: damaged checkpoint: The file is truncated" in message
    assert f"{root / 'global_step4'} is complete. Load it with load: {root} and iteration: 4." in message
    path.unlink()
    with pytest.raises(CheckpointError, match="The file is missing"):
        CheckpointReader(find_checkpoint(root))


def test_any_flipped_bit_is_found_and_its_file_named(root):
    folder = root / "global_step8"
    dice = random.Random(3)
    for path in (folder / "rank_00000.safetensors", folder / "manifest.json"):
        good = path.read_bytes()
        for _ in range(20):
            bad = bytearray(good)
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
            path.write_bytes(bad)
            if path.suffix == ".json" and json_equal(good, bad):
                continue  # such as a newline that became another blank
            with pytest.raises(CheckpointError, match=path.name):
                CheckpointReader(folder).verify()
        path.write_bytes(good)
    CheckpointReader(folder).verify()


def json_equal(good: bytes, bad: bytes) -> bool:
    try:
        return json.loads(good) == json.loads(bad)
    except ValueError:
        return False


def test_reading_a_damaged_tensor_fails_and_others_are_read(root):
    folder = root / "global_step8"
    path = folder / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = CheckpointReader(folder)
    last = list(make_state(8))[-1]
    with pytest.raises(CheckpointError, match=r"values of exp_avg/head/0 do not match their hash.*global_step4"):
        reader.read(*last)
    assert reader.read("scale", "master") is not None
    assert reader.read("scale", "nothing") is None


def test_a_manifest_of_a_later_version(root, monkeypatch):
    monkeypatch.setattr(manifest_module, "VERSION", 3)
    save_checkpoint(root, 12, whole(make_state()), {}, small_config(), {}, MESH)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"version = 3: This installation reads checkpoint versions 1 to 2"):
        CheckpointReader(find_checkpoint(root))


def test_a_master_that_is_not_its_weight(root):
    state = make_state(8)
    state["scale", "master"] = state["scale", "master"] + 1
    folder = save_checkpoint(root, 9, whole(state), {}, small_config(), {}, MESH)
    with pytest.raises(CheckpointError, match="master of scale: Rounded to the weight's dtype"):
        CheckpointReader(folder).verify()


def test_a_checkpoint_of_another_model_names_all_keys(root):
    reader = CheckpointReader(find_checkpoint(root))
    require_same_model(reader, small_config())
    require_same_model(reader, small_config(num_kv_heads=2))
    with pytest.raises(CheckpointError) as caught:
        require_same_model(reader, small_config(num_layers=6, norm="rmsnorm", bias_gelu_fusion=True))
    message = str(caught.value)
    assert "num_layers = 6: This is a checkpoint of another model: it was trained with num_layers = 2." in message
    assert "norm = rmsnorm" in message
    assert "bias_gelu_fusion = True" in message


def test_fine_tuning_may_change_what_keeps_the_shapes(root):
    reader = CheckpointReader(find_checkpoint(root))
    with pytest.raises(CheckpointError, match="rotary_emb_base"):
        require_same_model(reader, small_config(rotary_emb_base=500000.0))
    require_same_model(reader, small_config(rotary_emb_base=500000.0, finetune=True))
    require_same_model(reader, small_config(seq_length=32, max_position_embeddings=32))


def test_shapes_and_tokenizer(root):
    reader = CheckpointReader(find_checkpoint(root))
    shapes = dict(reader.shapes)
    require_shapes(reader, shapes)
    shapes["scale"] = (3,)
    shapes["extra"] = (1,)
    del shapes["head"]
    with pytest.raises(CheckpointError) as caught:
        require_shapes(reader, shapes)
    for text in (
        "weight scale: The model has [3], the checkpoint []",
        "weight extra: The model has",
        "weight head: The",
    ):
        assert text in str(caught.value)
    require_tokenizer(reader, "HFTokenizer", "0123456789abcdef")
    with pytest.raises(CheckpointError, match="trained with HFTokenizer \\(0123456789ab\\)"):
        require_tokenizer(reader, "HFTokenizer", "ffff")


def test_the_stored_config_is_the_config(root):
    assert stored_config(CheckpointReader(find_checkpoint(root))) == small_config()


def with_config_key(root, section, key, value):
    """Return a reader whose manifest was written by a version that had one more key."""
    reader = CheckpointReader(find_checkpoint(root))
    sections = {name: dict(keys) for name, keys in reader.manifest.config.items()}
    sections[section][key] = value
    reader.manifest = dataclasses.replace(reader.manifest, config=sections)
    return reader


def test_a_config_of_an_earlier_version_is_read_like_a_yaml_file(root):
    reader = with_config_key(root, "numerics", "fp32_allreduce", False)  # a key that configs may hold and nothing reads
    assert stored_config(reader) == small_config()


def test_a_stored_key_that_is_not_known_any_more_is_named(root):
    with pytest.raises(CheckpointError, match=r"global_step8/config\.yml: a_key_of_the_future"):
        stored_config(with_config_key(root, "model", "a_key_of_the_future", 3))


def test_dtype_is_known_without_reading(root):
    assert CheckpointReader(find_checkpoint(root)).dtype("scale") is torch.bfloat16


def test_a_checkpoint_of_version_1_is_read_and_proved(tmp_path):
    """The folder was written by two ranks with the code of version 1: one sha256 for each piece."""
    root = tmp_path / "version1"
    shutil.copytree(Path(__file__).with_name("version1"), root)
    reader = CheckpointReader(find_checkpoint(root))
    reader.verify()
    for (name, kind), tensor in make_state(11).items():
        assert same_bits(reader.read(name, kind), tensor)
    gated = torch.arange(32, dtype=torch.float32).reshape(8, 4)
    assert same_bits(reader.read("layers.0.mlp.linear1.weight"), gated)
    path = reader.folder.local_path("rank_00001.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors: damaged checkpoint: The values of"):
        CheckpointReader(find_checkpoint(root)).verify()


def test_a_checkpoint_behind_a_url(tmp_path, monkeypatch):
    root = storage_of("memory://a-checkpoint-behind-a-url/run")
    with pytest.raises(CheckpointError, match="There is no such bucket or folder"):
        find_checkpoint(str(root))
    for iteration in (4, 8):
        snapshot = take_snapshot(iteration, whole(make_state(iteration)), {}, small_config(), {})
        save_snapshot(snapshot, root, MESH, None)
    reader = CheckpointReader(find_checkpoint("memory://a-checkpoint-behind-a-url/run"))
    reader.verify()
    for (name, kind), tensor in make_state(8).items():
        assert same_bits(reader.read(name, kind), tensor)
    (file,) = reader.manifest.files
    data = reader.folder.read(file)
    data[-1] ^= 1
    reader.folder.write(file, bytes(data))
    with pytest.raises(
        DamagedCheckpointError, match=r"memory://.*/global_step4 is complete. Load it with load: memory"
    ):
        CheckpointReader(reader.folder).verify()

    def unreachable(self, name, offset=0, size=None):
        raise OSError(5, "the store does not answer")

    monkeypatch.setattr(ObjectStorage, "read", unreachable)
    with pytest.raises(CheckpointError, match="the store does not answer") as caught:
        reader.read("head", "weight")
    assert not isinstance(caught.value, DamagedCheckpointError)  # an earlier checkpoint must not take its place
