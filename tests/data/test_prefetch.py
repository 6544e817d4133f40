"""Steps that are fetched ahead are the loader's, in its order, and are consumed when they are taken."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron.data.batch import Batch
from megatron.data.prefetch import Prefetcher, on_device

CPU = torch.device("cpu")


class Loader:
    """Steps of two micro-batches that hold their number; the fourth cannot be read."""

    def __init__(self, pin: bool = False, broken: bool = True) -> None:
        self.consumed_samples, self._pin, self._broken = 100, pin, broken
        self._numbers = itertools.count()

    def __next__(self) -> list[Batch]:
        number = next(self._numbers)
        if self._broken and number == 3:
            raise ValueError("this sample is damaged")
        self.consumed_samples += 8
        tokens = torch.full((2, 512), number)
        tokens = tokens.pin_memory() if self._pin else tokens
        return [Batch(tokens, tokens + 1, torch.ones(2, 512)) for _ in range(2)]


def test_order_and_position_are_the_loaders() -> None:
    loader = Loader()
    steps = Prefetcher(loader, CPU)
    assert steps.consumed_samples == 100
    for number in range(2):
        batches = next(steps)
        assert [int(batch.tokens[0, 0]) for batch in batches] == [number, number]
        assert steps.consumed_samples == 100 + 8 * (number + 1)
        assert loader.consumed_samples == steps.consumed_samples + 8


def test_an_error_is_raised_at_its_step_and_not_before() -> None:
    steps = Prefetcher(Loader(), CPU)
    for _ in range(3):
        next(steps)
    assert steps.consumed_samples == 124
    with pytest.raises(ValueError, match="this sample is damaged"):
        next(steps)


def test_on_a_cpu_nothing_is_fetched_ahead() -> None:
    loader = Loader()
    assert on_device(loader, CPU) is loader


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_arrives_on_a_gpu_is_whole() -> None:
    steps = on_device(Loader(pin=True, broken=False), torch.device("cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    sums = []
    for _ in range(20):
        busy = (busy @ busy).clamp(-1, 1)  # the device is behind while further steps arrive
        sums.append(next(steps)[1].tokens.sum())
    assert [int(value) for value in sums] == [number * 1024 for number in range(20)]
