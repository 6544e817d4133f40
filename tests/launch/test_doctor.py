from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

from megatron.launch import doctor
from megatron.launch.doctor import Finding
from megatron.ops.cpu import library


def test_a_package_that_works_has_its_version() -> None:
    import numpy

    assert doctor._probe("numpy") == Finding("numpy", numpy.__version__)


def test_a_missing_package_has_pythons_own_words() -> None:
    found = doctor._optional("no_such_kernels", "speed", "pip install it", True)
    assert found.value == "not usable (speed: pip install it)"
    assert found.problem == "ModuleNotFoundError: No module named 'no_such_kernels'"


def test_what_this_version_does_not_use_is_recommended_to_nobody() -> None:
    found = doctor._optional("no_such_kernels", "speed", "pip install it", False)
    assert found == Finding("no_such_kernels", "not here (not used by this version)")
    assert doctor._optional("numpy", "speed", "", False).value.endswith(" (not used by this version)")


def test_the_files_of_unused_packages_say_so() -> None:
    folder = Path(doctor.__file__).parents[2] / "requirements"
    for _, _, install, is_used in doctor.OPTIONAL:
        name = install.rpartition("requirements/")[2]
        if install != name:
            assert ("Not used by this version" in (folder / name).read_text()) is not is_used, name


def test_an_import_that_crashes_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(name: str) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(doctor.importlib, "import_module", crash)
    assert doctor._probe("broken").problem == "the import ended the process with SIGKILL"


def test_a_broken_library_is_reported_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> NoReturn:
        raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = doctor._probe("flash_attn")
    assert found.problem == "OSError: libcudart.so.12: cannot open shared object file: No such file or directory"


def test_the_report_ends_with_a_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda name: Finding(name, "1.0"))
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for title in ("Machine", "Required packages", "Optional packages", "Compilers"):
        assert title in text
    assert text.splitlines()[-1].startswith("Training can run here, on ")


def test_it_says_whether_kernels_for_the_cpu_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = [each for each in doctor.compilers() if each.name == "kernels for the CPU"]
    assert found.value.startswith("C++, built by /")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    library.make_ready.cache_clear()
    (found,) = [each for each in doctor.compilers() if each.name == "kernels for the CPU"]
    assert found.value == "PyTorch's own"
    assert found.problem.startswith("no C++ compiler was found")


def test_a_machine_that_cannot_train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda name: Finding(name, "not usable", "ImportError: x"))
    assert doctor.main([]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Training cannot run here: torch, deepspeed,")
    assert last.endswith("Run `make install`.")
