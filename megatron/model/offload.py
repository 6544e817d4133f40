"""What blocks keep for the backward pass, in the CPU's memory: out while the next block runs, back one block ahead.

    forward     block     0    1    2    3          a block's tensors leave on a stream of their own; the block after
                out            0    1    2          next waits until they have, so that two blocks' are on the device
    backward    block     3    2    1    0
                back      2    1    0

Each storage travels once, whatever views of it are kept and by how many blocks. Parameters and what is small stay. The
last block of a model stays too, since its backward pass comes at once. On a CPU a storage is copied and copied back.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**16
"""Bytes of the smallest storage that travels."""

NEAR = 2
"""Blocks whose tensors are on the device at once."""


class Offload:
    """Takes what blocks keep to the CPU. One for each model; blocks are run within `block`, in order.

    pass_ = offload.start()                  # of one micro-batch
    for block in blocks:
        with offload.block(pass_): hidden = block(hidden)
    """

    def __init__(self) -> None:
        self._near: deque[_Load] = deque()
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> Pass:
        """Return the forward pass of a micro-batch."""
        return Pass()

    @contextmanager
    def block(self, forward: Pass, device: torch.device) -> Iterator[None]:
        """Within it, whatever is kept for the backward pass leaves `device`."""
        while len(self._near) >= NEAR:
            self._near.popleft().leave()
        load = _Load(self._copier(device), forward.last)
        forward.last = load

        def pack(tensor: Tensor) -> Any:
            return _Stayed(tensor) if _stays(tensor, device) else _Piece(load, forward.parcel(load, tensor), tensor)

        with saved_tensors_hooks(pack, lambda held: held.tensor()):
            yield
        load.copied = load.copier.mark()
        self._near.append(load)

    def _copier(self, device: torch.device) -> _Copier:
        if device.type != "cuda":
            return _Copier()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return _StreamCopier(self._stream)


class Pass:
    """One micro-batch's way through the blocks. last: what its latest block has sent away."""

    def __init__(self) -> None:
        self.last: _Load | None = None
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[_Parcel]]] = {}

    def parcel(self, load: _Load, tensor: Tensor) -> _Parcel:
        """Return what the tensor's storage travels as, which is sent now unless it has been before."""
        storage = tensor.untyped_storage()
        reference, known = self._known.get(storage.data_ptr(), (None, None))
        parcel = known() if known is not None and reference is not None and not reference.expired() else None
        if parcel is None:  # new, or another storage in the same place
            parcel = _Parcel(storage, load.copier)
            self._known[storage.data_ptr()] = StorageWeakRef(storage), weakref.ref(parcel)
        load.parcels.append(weakref.ref(parcel))
        return parcel


class _Load:
    """What one block has sent away. before: what the block before it has, which is needed after it."""

    def __init__(self, copier: _Copier, before: _Load | None) -> None:
        self.copier = copier
        self.before = before
        self.parcels: list[weakref.ref[_Parcel]] = []
        self.copied: torch.cuda.Event | None = None
        self._is_back = False

    def leave(self) -> None:
        """Let go of the device's memory, once all is copied, unless it is needed again already."""
        if self._is_back:
            return
        self.copier.wait(self.copied)
        for parcel in self._parcels():
            parcel.storage = None

    def come_back(self) -> None:
        """Start what brings everything back, and what the block before needs."""
        for load in (self, self.before):
            if load is not None and not load._is_back:
                load._is_back = True
                for parcel in load._parcels():
                    parcel.come_back()
        self.before = None

    def _parcels(self) -> Iterator[_Parcel]:
        return (parcel for reference in self.parcels if (parcel := reference()) is not None)


class _Parcel:
    """The bytes of one storage. storage: on the device, while it is there."""

    def __init__(self, storage: torch.UntypedStorage, copier: _Copier) -> None:
        self._copier = copier
        self.storage: torch.UntypedStorage | None = storage
        self._device = storage.device
        self._away = copier.out(_bytes(storage))
        self._arrival: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the CPU's memory."""
        return self._away.numel()

    def come_back(self) -> None:
        if self.storage is None:
            brought, self._arrival = self._copier.back(self._away, self._device)
            self.storage = brought.untyped_storage()

    def here(self) -> torch.UntypedStorage:
        """Return the storage on the device, when it has arrived."""
        self.come_back()
        self._copier.wait(self._arrival)
        assert self.storage is not None
        return self.storage


class _Piece:
    """A tensor that looks into a parcel."""

    def __init__(self, load: _Load, parcel: _Parcel, tensor: Tensor) -> None:
        self._load, self._parcel = load, parcel
        self._dtype = tensor.dtype
        self._place = int(tensor.storage_offset()), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        self._load.come_back()
        storage = self._parcel.here()
        return torch.empty(0, dtype=self._dtype, device=storage.device).set_(storage, *self._place)


class _Stayed:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensor(self) -> Tensor:
        return self._tensor


class _Copier:
    """Copies between two places in the CPU's memory: the mechanism without its use."""

    def out(self, source: Tensor) -> Tensor:
        """Return a copy in the CPU's memory."""
        return source.clone()

    def back(self, away: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return a copy on the device, and what happens when it is complete."""
        return away.clone(), None

    def mark(self) -> torch.cuda.Event | None:
        """Return what happens when all copies so far are complete."""
        return None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the device's computation go on only after the event."""


class _StreamCopier(_Copier):
    """Copies between a GPU and page-locked memory, on a stream beside the computation."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def out(self, source: Tensor) -> Tensor:
        away = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            away.copy_(source, non_blocking=True)
        return away

    def back(self, away: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        brought = torch.empty(away.shape, dtype=away.dtype, device=device)
        brought.record_stream(self._stream)  # so that it is not given to others before the copy, should nobody use it
        self._stream.wait_stream(torch.cuda.current_stream(device))  # its memory may have just been free there
        with torch.cuda.stream(self._stream):
            brought.copy_(away, non_blocking=True)
        return brought, self.mark()

    def mark(self) -> torch.cuda.Event | None:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)


def _stays(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor stays: a parameter or a view of one, one of another device, or a small one."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    return tensor.device != device or tensor.untyped_storage().nbytes() < SMALLEST


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as uint8, in place."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
