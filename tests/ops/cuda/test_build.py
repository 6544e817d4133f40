"""nvcc builds the library once for all ranks, without spills, and what it cannot do is said in its own words."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from shutil import copytree

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.errors import KernelError
from megatron.ops.building import LOG, cache_folder
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Candidate, Situation, choose
from megatron.ops.cuda import build, cross_entropy
from megatron.ops.cuda import compile as ahead
from tests.ops.cuda.conftest import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "cuda_kernels.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPERATORS = ("cross_entropy_losses_", "logits_statistics", "logits_gradient_")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that writes down that it was called, says something, and fails if there is a file `broken` beside it."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$0")\n'
        '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit 0\n'
        'echo call >> "$here/calls"; sleep 0.2\n'
        'echo "ptxas info : something"\n'
        '[ -e "$here/broken" ] && echo "nvcc fatal : Unsupported gpu architecture" >&2 && exit 1\n'
        'while [ "$1" != -o ]; do shift; done; echo library > "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    return nvcc


def test_ranks_that_come_together_build_once(compiler: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(4) as ranks:
        found = set(ranks.map(lambda rank: build.library(("90",), folder), range(4)))
    assert len(found) == 1
    assert (compiler.parent / "calls").read_text() == "call\n"
    place = found.pop().parent
    assert {path.name for path in place.iterdir()} == {build.LIBRARY, LOG}
    assert {path.name for path in folder.iterdir()} == {place.name, f"{place.name}.lock"}, "something was left behind"
    compiler.unlink()
    assert build.library(("90",), folder) == place / build.LIBRARY, "what is built needs no compiler"


def test_what_nvcc_says_is_told_and_nothing_half_built_stays(compiler: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    (compiler.parent / "broken").touch()
    with pytest.raises(KernelError) as caught:
        build.library(("90",), folder)
    assert "nvcc ended with 1 and said: nvcc fatal : Unsupported gpu architecture" in str(caught.value)
    assert str(compiler) in str(caught.value)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    (compiler.parent / "broken").unlink()
    assert build.library(("90",), folder).is_file()


def test_another_source_torch_or_architecture_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {build.key(("90",)), build.key(("80",)), build.key(("80", "90"))}
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")
    keys.add(build.key(("90",)))
    copytree(build.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    assert build.key(("90",)) in keys, "where the sources lie does not matter"
    with (tmp_path / "sources" / "rows.cuh").open("a") as file:
        file.write("// changed\n")
    keys.add(build.key(("90",)))
    assert len(keys) == 5


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("cuda") == Path("/somewhere/deepy/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder("cuda") == Path("/home/someone/.cache/deepy/cuda")


def test_a_torch_with_cuda_is_linked_for_its_streams(tmp_path: Path) -> None:
    """Its library must be among those that ours needs: a weak symbol is looked for nowhere else."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cpu.so").touch()
    command = build.command(Path("nvcc"), ("80", "90"), Path("out.so"), tmp_path)
    assert "-ltorch_cuda" not in command
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    command = build.command(Path("nvcc"), ("80", "90"), Path("out.so"), tmp_path)
    assert command.index("-Xlinker=--no-as-needed") < command.index("-ltorch_cuda")
    assert "-gencode=arch=compute_80,code=sm_80" in command
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in command


def test_wheels_are_found_as_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    (tmp_path / "nvidia" / "cu13" / "nvvm").mkdir()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert build.compiler() == nvcc
    assert f"-L{nvcc.parents[1] / 'lib'}" in build.command(nvcc, ("90",), Path("out.so"), tmp_path)


def test_the_table_of_kernels_says_that_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    build.make_ready.cache_clear()
    situation = Situation(torch.device("cuda"), torch.bfloat16, 32)
    choices = choose({"cross_entropy": "cuda", "share_losses": "cuda"}, situation, CATALOGUE)
    build.make_ready.cache_clear()
    assert [choice.candidate for choice in choices.choices] == ["eager", "eager"]
    for choice in choices.choices:
        ((name, reason),) = choice.refused
        assert name == "cuda"
        assert "no nvcc was found in CUDA_HOME, in PATH, among the installed wheels" in reason
        assert "pip install nvidia-cuda-nvcc" in reason
    assert "not cuda" in choices.table()


def test_a_library_that_cannot_be_loaded_is_told(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    reason = build.make_ready.__wrapped__(torch.device("cuda"))
    assert "deepy_cuda.so: file too short" in reason
    assert (tmp_path / "cache" / "deepy" / "cuda" / build.key(("120",)) / build.LIBRARY).is_file()


def test_every_source_is_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["megatron"]
    sources = [path.relative_to(ROOT / "megatron") for path in build.SOURCES.iterdir() if path.is_file()]
    assert len(sources) > 8
    assert [
        name for name in sources if name.suffix != ".py" and not any(fnmatch(str(name), each) for each in patterns)
    ] == []


def test_every_kernel_compiles_for_every_architecture_and_nothing_spills(built: Path) -> None:
    rows = ahead.resources((built.parent / LOG).read_text())
    assert {(row.kernel, row.logits, row.arch) for row in rows} == {
        (kernel, logits, int(arch))
        for kernel in ("losses", "statistics", "gradient")
        for logits in ("fp32", "bf16", "fp16")
        for arch in ARCHITECTURES
    }
    assert len(rows) == 27
    assert [row for row in rows if row.spilled] == []
    assert all(0 < row.registers <= 64 for row in rows), "two blocks of 512 threads do not fit side by side"


def test_the_library_is_for_these_architectures_and_newer_ones(built: Path) -> None:
    def listed(kind: str) -> set[str]:
        command = [str(CUOBJDUMP), f"--list-{kind}", str(built)]
        return set(re.findall(r"sm_\d+", subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    assert listed("elf") == {f"sm_{arch}" for arch in ARCHITECTURES}
    assert listed("ptx") == {"sm_100"}


def test_rows_move_16_bytes_at_a_time(built: Path) -> None:
    """Into shared memory past registers and L1 cache, from there, and as gradients to global memory."""
    command = [str(CUOBJDUMP), "-sass", "--gpu-architecture", "sm_90", str(built)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for kernel in re.split(r"Function : ", text)[1:]:
        instructions = set(re.findall(r"\b(?:LDGSTS|LDG|LDS|STG)[.\w]*\.128\b", kernel))
        if "KindE0" in kernel:
            assert {"LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.128", "STG.E.128"} <= instructions
    assert len(re.findall(r"Function : .*KindE0", text)) == 3


def test_the_page_is_current(built: Path) -> None:
    log, text = (built.parent / LOG).read_text(), PAGE.read_text()
    expected = ahead.page(log)
    if f"with nvcc {ahead.release(log)}." not in text:  # whose registers are others; the kernels are the same
        text, expected = names(text), names(expected)
    assert text == expected, "run python -m megatron.ops.cuda.compile --page docs/cuda_kernels.md"


def names(text: str) -> list[str]:
    """Return the lines of the tables without what the compiler decides."""
    return ["|".join(line.split("|")[:4]) for line in text.splitlines() if line.startswith("|")]


def test_the_library_has_the_kernels_of_the_operators(built: Path) -> None:
    """Loaded into a PyTorch without CUDA: what it registers is there, and fake CUDA tensors go through it."""
    torch.ops.load_library(str(built))
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deepy_cuda::{name}", "CUDA")
    with FakeTensorMode():
        logits = torch.empty(5, 37, dtype=torch.bfloat16, device="cuda")
        labels = torch.zeros(5, dtype=torch.int64, device="cuda")
        losses = cross_entropy.block_losses(logits, labels, 1.0)
        shared = cross_entropy.share_losses(logits, labels, 1.0, 0, lambda statistics: statistics)
    for found in (losses, shared):
        assert (found.shape, found.dtype, found.device.type) == ((5,), torch.float32, "cuda")


CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA's streams")
def test_arguments_reach_the_library_and_its_refusals_come_back(built: Path) -> None:
    """As far as a PyTorch without CUDA goes: to the stream that the kernel would be started in."""
    torch.ops.load_library(str(built))
    values, labels, ones = torch.zeros(5, 37), torch.zeros(5, dtype=torch.int64), torch.ones(5)
    operators = torch.ops.deepy_cuda
    calls = {
        operators.cross_entropy_losses_.default: (values, labels, 1.0),
        operators.logits_statistics.default: (values, labels, 3),
        operators.logits_gradient_.default: (values, labels, 3, ones, ones, 1.0),
    }
    for operator, arguments in calls.items():
        with pytest.raises(RuntimeError, match="this PyTorch has no CUDA streams"):
            operator.redispatch(CUDA, *arguments)
        with pytest.raises(RuntimeError, match="labels must be int64"):
            operator.redispatch(CUDA, arguments[0], labels.int(), *arguments[2:])
        with pytest.raises(RuntimeError, match="each row needs a label"):
            operator.redispatch(CUDA, arguments[0], labels[:4], *arguments[2:])
        with pytest.raises(RuntimeError, match="rows must be contiguous"):
            operator.redispatch(CUDA, values.t().contiguous().t(), *arguments[1:])
        with pytest.raises(RuntimeError, match="fp32, bf16 and fp16"):
            operator.redispatch(CUDA, values.double(), *arguments[1:])
    with pytest.raises(RuntimeError, match="each row needs its statistics"):
        operators.logits_gradient_.default.redispatch(CUDA, values, labels, 3, ones[:4], ones, 1.0)


def test_both_operations_can_be_computed_by_it() -> None:
    for name in ("cross_entropy", "share_losses"):
        (cuda,) = [each for each in CATALOGUE[name].candidates if each.name == "cuda"]
        assert cuda == Candidate("cuda", cuda.place, "torch", "megatron.ops.cuda.build:make_ready")
        assert cuda.load().__module__ == "megatron.ops.cuda.cross_entropy"
