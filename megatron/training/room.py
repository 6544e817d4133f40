"""How much memory a device has, and the most that this process has used of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.planning import machine


@dataclass(frozen=True)
class Room:
    """Bytes of a device: the most that this process had in use, what it may still get, and all that there is."""

    peak: int
    free: int
    total: int


def room(device: torch.device) -> Room:
    """Return the memory of a GPU, where it is tensors', or of this machine or container, where it is the process's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(torch.cuda.max_memory_allocated(device), free + unused, total)
    return Room(machine.peak_memory(), machine.available_memory(), machine.total_memory())


def in_use(device: torch.device) -> int:
    """Return the bytes that this process uses now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else machine.resident_memory()


def forget_peak(device: torch.device) -> None:
    """Let `Room.peak` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        machine.forget_peak()
