"""The pieces of a rank copied to host memory, so that training may go on while they are written.

The memory is taken by the first copy and used again by all later ones; on a GPU it is page-locked, which is what makes
the copy as fast as the bus.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.parallel.sharding import StatePiece

_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 30  # bytes; PyTorch takes page-locked memory in powers of two, so that one large buffer could cost twice


class HostCopies:
    """Memory for the copies of one rank's pieces. device: where the pieces are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[Tensor] = []

    def missing(self, pieces: Sequence[StatePiece]) -> int:
        """Return the bytes of host memory that a copy would take beyond what is held already."""
        held = [chunk.numel() for chunk in self._chunks]
        sizes = _plan(pieces)[1]
        return 0 if self._fits(sizes) else max(0, sum(sizes) - sum(held))

    def _fits(self, sizes: Sequence[int]) -> bool:
        return len(sizes) <= len(self._chunks) and all(
            chunk.numel() >= size for chunk, size in zip(self._chunks, sizes, strict=False)
        )

    def reserve(self, pieces: Sequence[StatePiece]) -> None:
        """Take the memory that a copy needs, where it is not held. Raises OSError where the system gives none."""
        sizes = _plan(pieces)[1]
        if self._fits(sizes):
            return
        self._chunks = []  # given back before the new ones are taken
        pinned = self._device.type == "cuda"
        try:
            self._chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        except (RuntimeError, MemoryError) as error:
            self._chunks = []
            raise OSError(errno.ENOMEM, f"no host memory for copies ({str(error).splitlines()[0]})") from error

    def copy(self, pieces: Sequence[StatePiece]) -> list[StatePiece]:
        """Return the pieces with copies of their values as they are now, which hold until the next call."""
        self.reserve(pieces)
        places = _plan(pieces)[0]
        copies = []
        for piece, (chunk, offset) in zip(pieces, places, strict=True):
            values = piece.data.detach().reshape(-1)
            raw = self._chunks[chunk][offset : offset + values.numel() * values.element_size()]
            target = raw.view(values.dtype)
            target.copy_(values, non_blocking=True)
            copies.append(replace(piece, data=target))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies


def _plan(pieces: Sequence[StatePiece]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return (chunk, offset) of each piece, and the sizes of the chunks, which are powers of two."""
    places: list[tuple[int, int]] = []
    filled: list[int] = []
    for piece in pieces:
        size = piece.data.numel() * piece.data.element_size()
        if not filled or filled[-1] + size > _CHUNK:
            filled.append(0)
        places.append((len(filled) - 1, filled[-1]))
        filled[-1] += size + -size % _ALIGNMENT
    return places, [1 << max(0, size - 1).bit_length() for size in filled]
