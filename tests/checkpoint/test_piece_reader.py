"""Any range of any share of a tensor, out of pieces that any number of ranks wrote; and what reading costs."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import piece_reader
from megatron.checkpoint.hashing import CURRENT, Hashing
from megatron.checkpoint.load import CheckpointReader
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.storage import storage_of
from megatron.errors import DamagedCheckpointError
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import ShardSpec, StatePiece, StateRequest, split
from tests.checkpoint.states import random_tensor, small_config

SPECS = [ShardSpec(), ShardSpec(0), ShardSpec(1), ShardSpec(2), ShardSpec(0, blocks=2), ShardSpec(1, blocks=3)]
SHAPE = (8, 12, 4)


def stored(name: str, full: Tensor, spec: ShardSpec, size: int, dice: random.Random) -> list[StatePiece]:
    """Return the pieces of `size` ranks on the tensor axis, each share cut at random places."""
    pieces = []
    for rank in range(size if spec.dim is not None else 1):
        share = split(full, spec, size, rank)
        flat = share.reshape(-1)
        cuts = sorted(dice.randint(0, flat.numel()) for _ in range(dice.randint(0, 3)))
        shard = (rank, size) if spec.dim is not None else (0, 1)
        for start, stop in itertools.pairwise([0, *cuts, flat.numel()]):
            pieces.append(StatePiece(name, "weight", tuple(share.shape), start, flat[start:stop], shard, spec))
    dice.shuffle(pieces)
    return pieces


def with_hashing(manifest: Manifest, folder: Path, hashing: Hashing) -> Manifest:
    """Return the manifest of the same files, hashed otherwise."""
    tensors = {}
    for name, entry in manifest.tensors["weight"].items():
        pieces = []
        for piece in entry.pieces:
            data = (folder / piece.file).read_bytes()[piece.offset :][: piece.length * 2]
            pieces.append(replace(piece, hashes=hashing.proof(data)))
        tensors[name] = replace(entry, pieces=tuple(pieces))
    data = {name: (folder / name).read_bytes()[: entry.header_size] for name, entry in manifest.files.items()}
    files = {name: replace(entry, header_hash=hashing.hash(data[name])) for name, entry in manifest.files.items()}
    return replace(manifest, tensors={"weight": tensors}, files=files, hashing=hashing)


@pytest.mark.parametrize("hashing", [CURRENT, Hashing("xxh3_128", 16), Hashing("sha256", 0)])
@pytest.mark.parametrize("limits", [(4 << 20, 1 << 20), (64, 8)], ids=["usual", "small"])
def test_any_range_of_any_share(tmp_path, monkeypatch, hashing, limits):
    monkeypatch.setattr(piece_reader, "_CHUNK", limits[0])
    monkeypatch.setattr(piece_reader, "_LONG", limits[1])
    dice, generator = random.Random(1), torch.Generator().manual_seed(1)
    tensors, pieces = {}, []
    for (number, spec), size in itertools.product(enumerate(SPECS), (1, 2, 4)):
        if spec.dim is not None and SHAPE[spec.dim] % (spec.blocks * size):
            continue
        name = f"{number}.{size}"
        tensors[name] = (random_tensor(SHAPE, torch.bfloat16, generator), spec)
        pieces += stored(name, tensors[name][0], spec, size, dice)
    folder = save_checkpoint(tmp_path, 1, pieces, {}, small_config(), {}, Mesh.single())
    manifest = CheckpointReader(folder).manifest
    reader = piece_reader.PieceReader(storage_of(folder), with_hashing(manifest, folder, hashing))
    requests, expected = [], []
    for name, (full, spec) in tensors.items():
        for size in (1, 2, 4):
            if spec.dim is not None and SHAPE[spec.dim] % (spec.blocks * size):
                continue
            for _ in range(4):
                rank = dice.randrange(size)
                share = split(full, spec, size, rank).reshape(-1)
                start, stop = sorted((dice.randint(0, share.numel()), dice.randint(0, share.numel())))
                surrounded = torch.zeros(stop - start + 6, dtype=torch.bfloat16)
                requests.append(StateRequest(name, "weight", start, surrounded[3:-3], (rank, size), spec))
                expected.append((surrounded, share[start:stop]))
    reader.fill(requests)
    for surrounded, values in expected:
        assert torch.equal(surrounded[3:-3].view(torch.int16), values.view(torch.int16))
        assert not surrounded[:3].any()
        assert not surrounded[-3:].any()


def test_another_dtype_is_converted(tmp_path):
    full = torch.randn(6, 8)
    folder = save_checkpoint(
        tmp_path, 1, stored("w", full, ShardSpec(1), 2, random.Random(2)), {}, small_config(), {}, Mesh.single()
    )
    target = torch.empty(24, dtype=torch.float16)
    CheckpointReader(folder).fill([StateRequest("w", "weight", 0, target, (0, 2), ShardSpec(1))])
    assert torch.equal(target.view(6, 4), full[:, :4].half())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of three tensors of 32 MiB in fp32, stored whole in one file, that are split in their last dim."""
    full = torch.arange(8 << 20, dtype=torch.float32).view(2048, 4096)
    pieces = [StatePiece(name, "weight", (2048, 4096), 0, full.view(-1), spec=ShardSpec(1)) for name in "wxy"]
    pieces.append(StatePiece("small", "weight", (2,), 0, torch.ones(2)))
    root = tmp_path_factory.mktemp("large")
    return save_checkpoint(root, 1, pieces, {}, small_config(), {}, Mesh.single()), full


def test_a_range_costs_its_blocks_and_no_more(large):
    folder, full = large
    for start, numel, blocks in [(0, 1 << 18, 1), (1 << 18, 3 << 18, 3), (5, 1 << 18, 2), ((8 << 20) - 7, 7, 1)]:
        reader = CheckpointReader(folder)
        target = torch.empty(numel)
        reader.fill([StateRequest("w", "weight", start, target)])
        assert torch.equal(target, full.view(-1)[start : start + numel])
        (entry,) = reader.manifest.files.values()
        assert reader.bytes_read == entry.header_size + blocks * CURRENT.block


def test_a_damaged_block_is_named_and_the_others_are_read(large, tmp_path):
    folder, full = large
    reader = CheckpointReader(folder)
    (name,) = reader.manifest.files
    data = bytearray((folder / name).read_bytes())
    end = reader.manifest.tensors["weight"]["w"].pieces[0].offset + full.nbytes
    data[end - CURRENT.block - 1] ^= 2  # in the last but one of 32 blocks
    (tmp_path / name).write_bytes(data)
    damaged = piece_reader.PieceReader(storage_of(tmp_path), reader.manifest)
    target = torch.empty(30 << 18)
    damaged.fill([StateRequest("w", "weight", 0, target)])
    assert torch.equal(target, full.view(-1)[: 30 << 18])
    with pytest.raises(DamagedCheckpointError, match=r"do not match their hash \(in bytes 31,457,280 to 32,505,856"):
        damaged.fill(
            [
                StateRequest("w", "weight", 31 << 18, torch.empty(1), (0, 1)),
                StateRequest("w", "weight", 30 << 18, torch.empty(9)),
            ]
        )


def peak_memory() -> int:
    """Return the largest resident size of this process since it was last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10


def test_resharding_three_tensors_needs_less_memory_than_one(large):
    """Of each tensor of 32 MiB, the left half of every row; the buffers of four threads are 5 MiB each."""
    folder, full = large
    reader = CheckpointReader(folder)
    targets = {name: torch.ones(4 << 20) for name in "wxy"}
    requests = [StateRequest(name, "weight", 0, target, (0, 2), ShardSpec(1)) for name, target in targets.items()]
    reader.read("small")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    reader.fill(requests)
    assert peak_memory() - before < full.nbytes
    assert all(torch.equal(target.view(2048, 2048), full[:, :2048]) for target in targets.values())
