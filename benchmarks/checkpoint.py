"""Saving, loading and re-sharding a checkpoint beside `torch.save` and `torch.load` of the same bytes.

    python benchmarks/checkpoint.py [--quick] [--json FILE] [--enforce] [--folder FOLDER]

The state is that of a model in bf16: weights, fp32 masters and two moments, one process. Both sides take turns in one
run, on one file system, each on a new file, and both sync what they write to the disk.

save      torch.save and fsync, beside ours, which also hashes, reads back and compares, renames, and syncs the folders
load      torch.load into new tensors, beside ours into those of a run, every block compared with its hash; the files
          are in the page cache on both sides ("cold": the system was asked to forget them)
re-shard  what one of two tensor-parallel ranks reads of a checkpoint that one process wrote; bytes it keeps per second
blocked   for how long an asynchronous save keeps training waiting, once its memory is held, and until it counts
memory    by how much loading and re-sharding raise the peak of the process, beside the tensors that are filled

What is judged is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from megatron import logs
from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.save import take_snapshot
from megatron.checkpoint.storage import storage_of
from megatron.checkpoint.writer import write_snapshot
from megatron.config.resolve import resolve
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import ShardSpec, StatePiece, StateRequest, split

AIMS = {"save_speedup": 1.0, "load_speedup": 1.5}
MESH = Mesh.single()
KINDS = {"weight": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
SPECS = {"up": ShardSpec(0), "down": ShardSpec(1)}
State = dict[tuple[str, str], Tensor]


def make_state(layers: int, width: int) -> State:
    """Return layers of two matrices [4w, w] and [w, 4w] and a norm, 118 MB each where w, the width, is 1024."""
    state: State = {}
    shapes = {"up": (4 * width, width), "down": (width, 4 * width), "norm": (width,)}
    for layer in range(layers):
        for part, shape in shapes.items():
            values = torch.randn(shape)
            for number, (kind, dtype) in enumerate(KINDS.items()):
                state[f"layers.{layer}.{part}", kind] = (values * 0.1**number).to(dtype)
    return state


def spec_of(name: str) -> ShardSpec:
    """Return how a tensor is split over the tensor axis."""
    return SPECS.get(name.rsplit(".", 1)[-1], ShardSpec())


def pieces_of(state: State) -> list[StatePiece]:
    """Return the state as one process hands it to a save."""
    return [
        StatePiece(name, kind, tuple(tensor.shape), 0, tensor.view(-1), spec=spec_of(name))
        for (name, kind), tensor in state.items()
    ]


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes on the wall clock."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_growth(action: Callable[[], object]) -> int:
    """Return by how many bytes an action raises the largest resident size of this process."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) << 10


class Sides:
    """Both sides of each comparison, in one folder."""

    def __init__(self, folder: Path, state: State) -> None:
        self.state = state
        self.targets = {key: torch.empty_like(tensor).fill_(1) for key, tensor in state.items()}
        self.shares = {key: split(self.targets[key], spec_of(key[0]), 2, 0).clone() for key in state}
        self.theirs, self.ours = folder / "theirs", folder / "ours"
        self.config = resolve({"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64,
                               "max_position_embeddings": 64, "train_iters": 100})  # fmt: skip
        self._background = BackgroundSaver(MESH, lambda: 1 << 62)

    def _snapshot(self) -> Any:
        return take_snapshot(1, pieces_of(self.state), {"iteration": 1}, self.config, None)

    def save_theirs(self) -> float:
        """Return the seconds of torch.save and fsync."""
        shutil.rmtree(self.theirs, ignore_errors=True)
        self.theirs.mkdir()
        return seconds(self._torch_save)

    def _torch_save(self) -> None:
        with open(self.theirs / "state.pt", "wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())

    def save_ours(self) -> float:
        """Return the seconds of a checkpoint."""
        shutil.rmtree(self.ours, ignore_errors=True)
        return seconds(lambda: write_snapshot(self._snapshot(), storage_of(self.ours), MESH, None))

    def save_behind(self) -> tuple[float, float]:
        """Return the seconds for which an asynchronous save blocks, and until it counts."""
        shutil.rmtree(self.ours, ignore_errors=True)
        root = storage_of(self.ours)
        self._background.start(self._snapshot(), lambda snapshot, mesh: write_snapshot(snapshot, root, mesh, None))
        finished = self._background.wait()
        assert finished is not None
        assert finished.error is None, finished.error
        return finished.blocked, finished.written

    def load_theirs(self) -> dict[tuple[str, str], Tensor]:
        """Return what torch.load makes of the file."""
        loaded: dict[tuple[str, str], Tensor] = torch.load(self.theirs / "state.pt", weights_only=True)
        return loaded

    def load_ours(self) -> CheckpointReader:
        """Fill the targets."""
        reader = CheckpointReader(find_checkpoint(self.ours))
        reader.fill(StateRequest(*key, 0, target.view(-1)) for key, target in self.targets.items())
        return reader

    def reshard(self) -> CheckpointReader:
        """Read what the first of two tensor-parallel ranks holds."""
        reader = CheckpointReader(find_checkpoint(self.ours))
        reader.fill(
            StateRequest(*key, 0, share.view(-1), (0, 2), spec_of(key[0])) for key, share in self.shares.items()
        )
        return reader

    def require_the_same(self) -> None:
        """Stop unless both sides gave back what was saved."""
        loaded = self.load_theirs()
        for key, tensor in self.state.items():
            assert torch.equal(loaded[key], tensor)
            assert torch.equal(self.targets[key], tensor)
            assert torch.equal(self.shares[key], split(tensor, spec_of(key[0]), 2, 0))


def measure(folder: Path, layers: int, rounds: int, cold: bool, width: int = 1024) -> dict[str, Any]:
    """Return bandwidths in GB/s, ratios, seconds and bytes: medians over the rounds, and every round."""
    sides = Sides(folder, make_state(layers, width))
    size = sum(tensor.nbytes for tensor in sides.state.values())
    kept = sum(share.nbytes for share in sides.shares.values())
    sides.save_behind()  # takes its memory, as the first save of a run does
    turns = []
    for _ in range(rounds):
        turn = {"torch_save": sides.save_theirs(), "async": sides.save_behind(), "save": sides.save_ours()}
        turn |= {"torch_load": seconds(sides.load_theirs), "load": seconds(sides.load_ours)}
        turn["reshard"] = seconds(sides.reshard)
        if cold:
            forget(folder)
            turn |= {"torch_load_cold": seconds(sides.load_theirs), "load_cold": seconds(sides.load_ours)}
        turns.append(turn)
    sides.require_the_same()
    rates = {name: size / statistics.median(turn[name] for turn in turns) / 1e9 for name in turns[0] if name != "async"}
    rates["reshard"] = kept / statistics.median(turn["reshard"] for turn in turns) / 1e9
    return {
        "gigabytes": size / 1e9,
        **{f"{name}_gb_per_second": rate for name, rate in rates.items()},
        "save_speedup": statistics.median(turn["torch_save"] / turn["save"] for turn in turns),
        "load_speedup": statistics.median(turn["torch_load"] / turn["load"] for turn in turns),
        "async_blocked_seconds": statistics.median(turn["async"][0] for turn in turns),
        "async_written_seconds": statistics.median(turn["async"][1] for turn in turns),
        "load_peak_mb": peak_growth(sides.load_ours) / 1e6,
        "reshard_peak_mb": peak_growth(sides.reshard) / 1e6,
        "torch_load_peak_mb": peak_growth(sides.load_theirs) / 1e6,
        "reshard_bytes_read_per_byte_kept": sides.reshard().bytes_read / kept,
        "load_average": os.getloadavg()[0],
        "rounds": [{name: _rounded(value) for name, value in turn.items()} for turn in turns],
    }


def _rounded(value: Any) -> Any:
    return [round(part, 4) for part in value] if isinstance(value, tuple) else round(value, 4)


def main() -> int:
    """Measure, print, and judge if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller state and fewer rounds; under 50 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--enforce", action="store_true", help="exit 1 where an aim is missed")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    logs.setup(level="WARNING")
    layers, rounds = (4, 3) if options.quick else (8, 5)
    with tempfile.TemporaryDirectory(prefix="checkpoint", dir=options.folder) as name:
        results = measure(Path(name), layers, rounds, cold=not options.quick)
    for key, value in results.items():
        if key != "rounds":
            print(f"{key:36} {value:>10.3f}")
    missed = [key for key, aim in AIMS.items() if results[key] < aim]
    for key in missed:
        print(f"missed: {key} is {results[key]:.2f}, the aim {AIMS[key]}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if missed and options.enforce else 0


if __name__ == "__main__":
    raise SystemExit(main())
