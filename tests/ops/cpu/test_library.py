"""The library is built once for all processes, is built again where it is not whole, and says why it cannot be had."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from shutil import copytree

import pytest
import torch

from megatron.ops.building import cache_folder
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Situation, choose
from megatron.ops.cpu import library

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
HERE = Situation(CPU, torch.bfloat16, 32)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C++ compiler that writes down that it was called, and fails if there is a file `broken` beside it."""
    compiler = tmp_path / "bin" / "cxx"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$0")\n'
        'case "$*" in *--version) cat "$here/version"; exit 0;; esac\n'
        'echo call >> "$here/calls"; sleep 0.2\n'
        '[ -e "$here/broken" ] && echo "fatal error: cmath: No such file or directory" >&2 && exit 1\n'
        'while [ "$1" != -o ]; do shift; done; echo library > "$2"\n'
    )
    compiler.chmod(0o755)
    (compiler.parent / "version").write_text("cxx 1.0\n")
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiler


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known of a library, and what was known before is not forgotten."""
    loaded = list(library._loaded)
    library.make_ready.cache_clear()
    yield
    library.make_ready.cache_clear()
    library._loaded[:] = loaded


@pytest.mark.parametrize("flags", [[], ["-mno-avx512f", "-mavx2"], ["-mno-avx"]], ids=" ".join)
def test_the_sources_are_what_the_compilers_that_are_here_know(flags: list[str]) -> None:
    """For this processor and, where it is an x86, for those of narrower vectors."""
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        flags = []
    found = {path for name in ("c++", "g++-9", "g++-11", "clang++") if (path := shutil.which(name))}
    for compiler in {str(Path(path).resolve()) for path in found}:
        words = [*library.command([compiler], Path("nothing"))[:-2], *flags, "-fsyntax-only"]
        result = subprocess.run(
            [word for word in words if word != "-shared"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr


def test_ranks_that_come_together_build_once(compiler: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as ranks:
        (found,) = set(ranks.map(lambda rank: library.library(), range(4)))
    assert (compiler.parent / "calls").read_text() == "call\n"
    place = found.parent
    assert place.parent == tmp_path / "cache" / "deepy" / "cpu"
    assert {path.name for path in place.iterdir()} == {library.LIBRARY, library.DIGEST, "build.log"}
    assert {path.name for path in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}


def test_what_is_not_whole_is_built_again(compiler: Path) -> None:
    found = library.library()
    found.write_text("lib")
    assert library.library() == found
    assert found.read_text() == "library\n"
    (found.parent / library.DIGEST).unlink()
    library.library()
    assert (compiler.parent / "calls").read_text() == "call\n" * 3


def test_another_source_compiler_flag_or_processor_is_another_library(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = library.compiler()
    assert words == [str(compiler), "-pipe"]
    keys = {library.key(words), library.key([*words, "-g"])}
    (compiler.parent / "version").write_text("cxx 2.0\n")
    keys.add(library.key(words))
    monkeypatch.setattr(library, "_processor", lambda: "another")
    keys.add(library.key(words))
    copytree(library.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
    assert library.key(words) in keys, "where the sources lie does not matter"
    with (tmp_path / "sources" / "vectors.h").open("a") as file:
        file.write("// changed\n")
    keys.add(library.key(words))
    assert len(keys) == 5


def table(asked: str | bool = "auto") -> str:
    return choose({"cross_entropy": asked}, HERE, CATALOGUE).table()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_pytorch_computes_and_the_table_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    (choice,) = choose({"cross_entropy": "auto"}, HERE, CATALOGUE).choices
    assert choice.candidate == "eager"
    assert choice.refused == (("cpp", "no C++ compiler was found: $CXX is /nowhere/c++, which is not there"),)


@pytest.mark.usefixtures("fresh")
def test_what_the_compiler_says_is_told_and_nothing_half_built_stays(compiler: Path) -> None:
    (compiler.parent / "broken").touch()
    assert "cxx ended with 1 and said: fatal error: cmath: No such file or directory" in table()
    assert [path.suffix for path in cache_folder("cpu").iterdir()] == [".lock"]
    assert (compiler.parent / "calls").read_text() == "call\n", "a run asks once"


@pytest.mark.usefixtures("fresh", "compiler")
def test_a_library_that_cannot_be_loaded_is_told() -> None:
    assert "file too short" in table("cpp") or "invalid ELF header" in table("cpp")


@pytest.mark.usefixtures("fresh")
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "Not a directory" in table()


@pytest.mark.usefixtures("fresh")
def test_a_pytorch_without_a_parallel_loop_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert "has no torch_parallel_for, which came with 2.10" in table()


@pytest.mark.usefixtures("fresh")
def test_what_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.ops.cpu.cross_entropy.block_losses", lambda logits, labels, scale: logits[:, 0])
    assert "not cpp" in table()
    assert "differs from the formula" in table()


def test_auto_takes_it_on_a_cpu_and_false_does_not() -> None:
    for asked, candidate in (("auto", "cpp"), (True, "cpp"), ("cpp", "cpp"), (False, "eager"), ("eager", "eager")):
        (choice,) = choose({"cross_entropy": asked}, HERE, CATALOGUE).choices
        assert choice.candidate == candidate, asked


def test_another_process_takes_what_is_built() -> None:
    """The one that built it for this test, or for an earlier run."""
    assert library.make_ready(CPU) == ""
    code = (
        "import torch\n"
        "from megatron.ops.cpu import library\n"
        "library._build = None\n"
        "assert library.make_ready(torch.device('cpu')) == ''\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_every_source_is_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["megatron"]
    sources = [path.relative_to(ROOT / "megatron") for path in library.SOURCES.iterdir() if path.is_file()]
    assert len([name for name in sources if name.suffix in (".h", ".cpp")]) >= 4
    assert [
        name for name in sources if name.suffix != ".py" and not any(fnmatch(str(name), each) for each in patterns)
    ] == []
