"""A rank from its variables and its arguments to its exit code, in forks of the test process."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron import whereabouts
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.config.transport import pack
from megatron.errors import DataError, Problem
from megatron.launch.board import Board
from megatron.launch.entry import run_worker
from megatron.launch.port import free_port
from megatron.launch.prelude import PAYLOAD_FLAG
from megatron.parallel.mesh import Mesh
from tests.end_to_end.tiny import settings
from tests.launch.forked import Forked, fork


def payload(folder: Path, world_size: int = 1, **changes: Any) -> list[str]:
    return [PAYLOAD_FLAG, pack(resolve(settings(folder, **changes), world_size))]


def two_ranks(work: Any, folder: Path, argv: list[str]) -> list[Forked]:
    """Start two ranks as torchrun or plain variables would."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(0))}
    return [
        fork(lambda: run_worker(work, argv), folder / f"output{rank}", {"RANK": str(rank), **shared})
        for rank in range(2)
    ]


def all_reduced(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    print(f"rank {mesh.world.rank} dp {mesh.dp.rank}/{mesh.dp.size} sum {total.item():.0f} seed {config.numerics.seed}")


def test_one_process_with_a_payload(tmp_path: Path) -> None:
    code, output = fork(lambda: run_worker(all_reduced, payload(tmp_path, seed=7)), tmp_path / "output").end()
    assert code == 0, output
    assert "rank 0 dp 0/1 sum 1 seed 7" in output
    assert "1 process on " in output


def test_two_ranks_with_plain_variables_and_files(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(settings(tmp_path)))
    argv = [str(tmp_path / "tiny.yml"), "--set", "seed=8"]
    ends = [rank.end() for rank in two_ranks(all_reduced, tmp_path, argv)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "rank 0 dp 0/2 sum 2 seed 8" in ends[0][1]
    assert "rank 1 dp 1/2 sum 2 seed 8" in ends[1][1]
    assert "2 processes on 1 host (" in ends[0][1]
    assert "processes on" not in ends[1][1]


def test_a_failed_rank_ends_the_others_without_a_launcher_of_ours(tmp_path: Path) -> None:
    def work(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        whereabouts.begin_step(12)
        if mesh.world.rank == 1:
            raise ZeroDivisionError("the cause")
        dist.barrier()

    (code0, output0), (code1, output1) = [rank.end() for rank in two_ranks(work, tmp_path, payload(tmp_path, 2))]
    assert (code0, code1) == (1, 1)
    assert "ZeroDivisionError: the cause" in output1
    assert output1.strip().splitlines()[-1].startswith("rank 1 of 2 on host ")
    assert "failed at step 12, in batch, exit code 1" in output1
    assert "Traceback" not in output0
    assert "ends because rank 1 on host" in output0
    assert output0.strip().endswith("failed at step 12, in batch (ZeroDivisionError: the cause).")


def test_a_killed_rank_is_reported_by_its_watch(tmp_path: Path) -> None:
    def work(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        whereabouts.begin_step(9)
        if mesh.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(()))

    (code0, output0), (code1, output1) = [rank.end() for rank in two_ranks(work, tmp_path, payload(tmp_path, 2))]
    assert (code0, code1) == (1, -signal.SIGKILL)
    last = output1.strip().splitlines()[-1]
    assert last.startswith("rank 1 of 2 on host ")
    assert " failed at step 9, in batch, exit code " in last
    assert "ran out of memory" in output1
    said = output0.strip().splitlines()[-1]
    assert said.startswith("rank 0 on host ")
    assert " ends because rank 1 on host " in said
    assert "Traceback" not in output0 + output1


def test_ranks_with_other_configs_are_told_apart(tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(0))}
    ranks = [
        fork(
            lambda seed=rank: run_worker(all_reduced, payload(tmp_path, 2, seed=seed + 1)),  # type: ignore[misc]
            tmp_path / f"output{rank}",
            {"RANK": str(rank), **shared},
        )
        for rank in range(2)
    ]
    code, output = ranks[0].end()
    ranks[1].end()
    assert code == 1
    assert "config (hash) is " in output
    assert "Rank 1 has seed = 2 (rank 0: 1). Give all ranks the same config files and overrides." in output


def test_a_mistake_has_its_own_exit_code_and_no_traceback(tmp_path: Path) -> None:
    def work(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        raise DataError(Problem("data_path = x", "is missing.", "Prepare it.", "a.yml:3"))

    code, output = fork(lambda: run_worker(work, payload(tmp_path)), tmp_path / "output").end()
    assert code == 2
    assert output.strip().splitlines()[-1] == "a.yml:3: data_path = x: is missing. Prepare it."
    assert "Traceback" not in output


def test_under_our_launcher_the_report_goes_to_the_board(tmp_path: Path) -> None:
    def work(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        whereabouts.begin_step(3)
        raise ZeroDivisionError("the cause")

    board = Board.create(1)
    environment = {"DEEPY_BOARD": str(board.folder)}
    code, output = fork(lambda: run_worker(work, payload(tmp_path)), tmp_path / "output", environment).end()
    failure, position = board.failure(0), board.position(0)
    board.remove()
    assert code == 1
    assert "the cause" not in output
    assert failure is not None
    assert position is not None
    assert (failure.step, position.step) == (3, 3)
    assert "ZeroDivisionError: the cause" in failure.text


def test_one_process_may_use_a_model_of_any_layout(tmp_path: Path) -> None:
    def work(config: Config, mesh: Mesh, files: Mapping[str, str]) -> None:
        assert not dist.is_initialized()
        print(f"world {mesh.world.size}, config for tensor {config.parallel.model_parallel_size}")

    argv = payload(tmp_path, 2, model_parallel_size=2)
    code, output = fork(lambda: run_worker(work, argv, decoding=True), tmp_path / "output").end()
    assert code == 0, output
    assert "world 1, config for tensor 2" in output


def test_a_wrong_config_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "wrong.yml").write_text("num_layer: 3\n")
    code, output = fork(lambda: run_worker(all_reduced, [str(tmp_path / "wrong.yml")]), tmp_path / "output").end()
    assert code == 2
    assert "wrong.yml:1: num_layer = 3: there is no such key. Did you mean num_layers" in output


def test_late_problems_have_the_place_of_their_key(tmp_path: Path) -> None:
    import yaml

    from megatron.training.run import train

    keys = {**settings(tmp_path), "data_path": "nope"}
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(keys))
    code, output = fork(lambda: run_worker(train, [str(tmp_path / "tiny.yml")]), tmp_path / "output").end()
    assert code == 2
    said = output.strip().splitlines()[-1]
    assert "data_path = nope: there is no nope.bin and no nope.idx." in said
    place = said.split(": data_path")[0]
    assert place.startswith("tiny.yml:")
    number = int(place.rpartition(":")[2])
    assert (tmp_path / "tiny.yml").read_text().splitlines()[number - 1] == "data_path: nope"


def test_a_vocab_file_that_is_no_tokenizer_ends_a_start_with_its_place(tmp_path: Path) -> None:
    from megatron.training.run import train

    (tmp_path / "list.json").write_text("[1]")
    changes = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "list.json")}
    word = pack(resolve(settings(tmp_path, **changes), 1), {"a.yml": f"\nvocab_file: {tmp_path / 'list.json'}\n"})
    code, output = fork(lambda: run_worker(train, [PAYLOAD_FLAG, word]), tmp_path / "output").end()
    assert code == 2
    assert output.strip().splitlines()[-1].startswith("a.yml:2: vocab_file = ")
    assert "so no tokenizer." in output
    assert "Traceback" not in output
