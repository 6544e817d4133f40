"""The device code of megatron/ops/cuda, compiled by g++ and run on CPU tensors as `host/device.h` describes.

device = Emulation(compiled(folder), ROOMY)
losses = device.losses(logits, labels, scale)
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.ops.cuda.build import SOURCES

HOST = Path(__file__).parent / "host"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOSSES, STATISTICS, GRADIENT = range(3)
OLDEST = 12
"""The g++ that knows _Float16."""

_POINTERS = ("logits", "labels", "results", "maxima", "totals")


class _Request(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("stride", "rows", "columns", "first")),
        ("scale", ctypes.c_float),
    ]


class _Situation(ctypes.Structure):
    _fields_ = [
        ("per_block", ctypes.c_int64),
        ("per_multiprocessor", ctypes.c_int64),
        ("has_clusters", ctypes.c_int),
        ("clusters", ctypes.c_int),
        ("order", ctypes.c_int),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Situation:
    """A device and how its threads take turns. per_block, per_multiprocessor: bytes of shared memory.

    clusters: how many run side by side, each of which takes every so manieth row. order: of the threads: 0 the first
    one first, 1 the last one first, others shuffle them.
    """

    per_block: int
    per_multiprocessor: int
    has_clusters: bool
    clusters: int = 2
    order: int = 0

    def structure(self, logits: Tensor) -> _Situation:
        """Return it in C's words, with the addresses of these logits."""
        beyond = (len(logits) - 1) * logits.stride(0) + logits.shape[1]
        low = logits.data_ptr()
        high = low + beyond * logits.element_size()
        numbers = (self.per_block, self.per_multiprocessor, self.has_clusters, self.clusters, self.order)
        return _Situation(*numbers, low, high)


A100 = Situation(166912, 167936, False)
H100 = Situation(232448, 233472, True)
GEFORCE = Situation(101376, 102400, False)
SMALL = Situation(4096, 20480, False, order=1)
"""Holds 222 vectors of a row."""
SMALL_CLUSTERS = Situation(4096, 20480, True, order=5)


def compiled(folder: Path, sources: Path = SOURCES, *flags: str) -> ctypes.CDLL:
    """Return the device code of `sources`, compiled into a folder."""
    target = folder / "emulation.so"
    flags = ("-O1", "-std=c++20", "-fno-strict-aliasing", *flags)
    command = ["g++", *flags, "-shared", "-fPIC", f"-I{HOST}", f"-I{sources}", str(HOST / "cross_entropy.cpp")]
    result = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    return library


class EmulationError(Exception):
    """What would be undefined on a GPU."""


@dataclass(frozen=True)
class Emulation:
    """The kernels on a device that is not there."""

    library: ctypes.CDLL
    situation: Situation

    def on(self, situation: Situation) -> Emulation:
        """Return the kernels on another device."""
        return replace(self, situation=situation)

    def losses(self, logits: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Return the losses [r], and put the gradients in the logits' place."""
        results = torch.full((len(logits),), float("nan"))
        self._run(LOSSES, logits, labels, results=results, scale=scale)
        return results

    def statistics(self, logits: Tensor, labels: Tensor, first: int) -> Tensor:
        """Return [3, r]: maximum, sum and the label's logit."""
        results = torch.full((3, len(logits)), float("nan"))
        self._run(STATISTICS, logits, labels, results=results, first=first)
        return results

    def gradient(
        self, logits: Tensor, labels: Tensor, first: int, maximum: Tensor, total: Tensor, scale: float
    ) -> None:
        """Put the gradients in the logits' place."""
        self._run(GRADIENT, logits, labels, maxima=maximum, totals=total, first=first, scale=scale)

    def plan(self, columns: int, element_size: int) -> list[int]:
        """Return threads, blocks of a cluster, columns of each, vectors it holds, and bytes of shared memory."""
        found = (ctypes.c_int64 * 5)()
        self.library.plan(columns, element_size, ctypes.byref(self.situation.structure(torch.empty(1, 1))), found)
        return list(found)

    def _run(
        self, kind: int, logits: Tensor, labels: Tensor, first: int = 0, scale: float = 1.0, **others: Tensor
    ) -> None:
        tensors = {"logits": logits, "labels": labels, **others}
        assert all(tensor.is_contiguous() for tensor in tensors.values() if tensor is not logits)
        pointers = [tensors[name].data_ptr() if name in tensors else None for name in _POINTERS]
        request = _Request(*pointers, logits.stride(0), *logits.shape, first, scale)
        situation = self.situation.structure(logits)
        failure = self.library.run(kind, ELEMENTS[logits.dtype], ctypes.byref(request), ctypes.byref(situation))
        if failure:
            raise EmulationError(failure.decode())
