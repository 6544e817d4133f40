"""Loaders: the same samples in every layout, resume without reading, threads that end, memory that stays."""

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from megatron.data.gpt import GptDataset, Samples
from megatron.data.loaders import BatchLoader, build_loader, make_batch
from megatron.data.sampler import Layout
from megatron.data.samples import packed_index
from megatron.errors import ConfigError
from tests.data.files import config_of, documents_of, write_documents


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GptDataset:
    folder = tmp_path_factory.mktemp("data")
    sizes = np.random.RandomState(1).randint(0, 60, 400).tolist()
    documents = documents_of(write_documents(folder / "text", sizes))
    return GptDataset(documents, packed_index(documents.sizes(), 16, 7, 1), 16)


class Counting:
    """A data set whose samples are their own indices; it remembers what was read."""

    def __init__(self, num_samples: int, delay: float = 0.0, fail_at: int | None = None) -> None:
        self.num_samples, self.delay, self.fail_at, self.seen = num_samples, delay, fail_at, []

    def __len__(self) -> int:
        return self.num_samples

    def read(self, indices: np.ndarray) -> Samples:
        time.sleep(self.delay)
        self.seen += indices.tolist()
        if self.fail_at is not None and self.fail_at in indices:
            raise ValueError(f"sample {self.fail_at} is broken")
        return Samples(np.repeat(indices[:, None], 5, axis=1))


def first_tokens(step: list) -> list[int]:
    return [token for batch in step for token in batch.tokens[:, 0].tolist()]


LAYOUTS = [(8, 1, 1), (4, 1, 2), (4, 2, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize(("micro_batch", "dp_size", "gas"), LAYOUTS)
def test_a_step_holds_the_same_samples_in_every_layout(micro_batch: int, dp_size: int, gas: int) -> None:
    for first in (0, 40):
        ranks = [
            BatchLoader(Counting(104), micro_batch, rank, dp_size, gas, consumed_samples=first, num_workers=0)
            for rank in range(dp_size)
        ]
        for step in range(5):
            found = [index for loader in ranks for index in first_tokens(next(loader))]
            assert sorted(found) == list(range(first + 8 * step, first + 8 * step + 8))


def test_a_micro_batch_is_sliced_by_rank_as_in_gpt_neox() -> None:
    layout = Layout(micro_batch=3, dp_rank=1, dp_size=2, gradient_accumulation_steps=2)
    assert layout.indices(12, 0, 100).tolist() == [15, 16, 17]
    assert layout.indices(12, 1, 100).tolist() == [21, 22, 23]
    assert layout.epoch_samples(100) == 96
    assert layout.indices(84, 1, 100).tolist() == [93, 94, 95]
    assert layout.indices(96, 0, 100).tolist() == [3, 4, 5]


def test_a_data_set_smaller_than_a_micro_batch_repeats() -> None:
    loader = BatchLoader(Counting(3), 4, dp_size=2, num_workers=0)
    assert first_tokens(next(loader)) == [0, 1, 2, 0]
    assert first_tokens(next(loader)) == [2, 0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_resume_continues_where_the_run_stopped(dataset: GptDataset, num_workers: int) -> None:
    with BatchLoader(dataset, 2, 1, 2, 3, num_workers=num_workers) as loader:
        whole = list(islice(loader, 12))
        assert loader.consumed_samples == 12 * 12
    with BatchLoader(dataset, 2, 1, 2, 3, consumed_samples=7 * 12, num_workers=num_workers) as loader:
        resumed = list(islice(loader, 5))
    for expected, found in zip(whole[7:], resumed, strict=True):
        for left, right in zip(expected, found, strict=True):
            assert torch.equal(left.tokens, right.tokens)
            assert torch.equal(left.labels, right.labels)


def test_resume_reads_nothing_before_its_position() -> None:
    dataset = Counting(10**9)
    loader = BatchLoader(dataset, 4, num_workers=0, consumed_samples=4 * 10**8)
    next(loader)
    loader.seek(10**9 - 4)
    next(loader)
    assert dataset.seen == [*range(4 * 10**8, 4 * 10**8 + 4), *range(10**9 - 4, 10**9)]


def test_seek_drops_what_was_read_ahead() -> None:
    with BatchLoader(Counting(1000), 2, num_workers=2) as loader:
        assert first_tokens(next(loader)) == [0, 1]
        loader.seek(100)
        assert first_tokens(next(loader)) == [100, 101]
        assert loader.consumed_samples == 102


def test_windows_do_not_move_the_loader() -> None:
    with BatchLoader(Counting(20), 2, gas=2, num_workers=2) as loader:
        next(loader)
        assert [first_tokens(step) for step in loader.window(4, 2)] == [[16, 17, 18, 19], [0, 1, 2, 3]]
        assert [first_tokens(step) for step in loader.window(4, 1)] == [[16, 17, 18, 19]]
        assert first_tokens(next(loader)) == [4, 5, 6, 7]


def test_reading_ahead_is_bounded() -> None:
    dataset = Counting(10**6)
    with BatchLoader(dataset, 1, num_workers=2) as loader:
        next(loader)
        time.sleep(0.1)
        assert len(dataset.seen) <= 5


def test_reading_ahead_hides_the_reading() -> None:
    with BatchLoader(Counting(1000, delay=0.02), 1, num_workers=2) as loader:
        next(loader)
        time.sleep(0.15)
        begin = time.perf_counter()
        next(loader)
        assert time.perf_counter() - begin < 0.015


def test_order_is_kept_when_threads_race() -> None:
    class Uneven(Counting):
        def read(self, indices: np.ndarray) -> Samples:
            time.sleep(0.002 * (indices[0] % 3))
            return super().read(indices)

    with BatchLoader(Uneven(1000), 2, num_workers=4) as loader:
        assert [first_tokens(step)[0] for step in islice(loader, 40)] == list(range(0, 80, 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_reading_is_raised_where_the_step_is_taken(num_workers: int) -> None:
    with BatchLoader(Counting(100, fail_at=5), 2, num_workers=num_workers) as loader:
        assert first_tokens(next(loader)) == [0, 1]
        assert first_tokens(next(loader)) == [2, 3]
        with pytest.raises(ValueError, match="sample 5 is broken"):
            next(loader)


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_closing_ends_the_threads() -> None:
    loader = BatchLoader(Counting(1000, delay=0.01), 1, num_workers=3)
    next(loader)
    assert batch_threads()
    loader.close()
    assert not batch_threads()


def test_a_forgotten_loader_ends_its_threads() -> None:
    loader = BatchLoader(Counting(1000), 1, num_workers=2)
    next(loader)
    del loader
    for _ in range(100):
        gc.collect()
        if not batch_threads():
            return
        time.sleep(0.02)
    raise AssertionError(f"still running: {batch_threads()}")


def test_memory_does_not_grow_with_epochs(dataset: GptDataset) -> None:
    with BatchLoader(dataset, 8, num_workers=1) as loader:
        steps: Iterator = islice(loader, 300)
        for _ in range(50):
            next(steps)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in steps:  # five epochs
                pass
            gc.collect()
            growth = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert growth < 50_000  # one remembered batch is 3 kB, 250 of them 800 kB


def test_batches_have_shifted_labels_and_masks() -> None:
    text = np.array([[5, 0, 6, 7], [0, 0, 8, 9]])
    labels = np.array([[5, -100, 6, 7], [-100, -100, -100, 9]])
    batch = make_batch(Samples(text, labels), eod_token=0)
    assert batch.tokens.tolist() == [[5, 0, 6], [0, 0, 8]]
    assert batch.labels.tolist() == [[0, 6, 7], [0, 0, 9]]
    assert batch.loss_mask.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert make_batch(Samples(text)).loss_mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert make_batch(Samples(text), eod_token=0).loss_mask.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_loader_of_a_config_masks_after_documents(dataset: GptDataset) -> None:
    config = config_of(data_path="unused", eod_mask_loss=True, gradient_accumulation_steps=2)
    loader = build_loader(config, dataset, eod_token=3, consumed_samples=4)
    step = next(loader)
    assert len(step) == 2
    for batch in step:
        assert torch.equal(batch.loss_mask == 0, batch.tokens == 3)
    with pytest.raises(ConfigError, match="eod_mask_loss = true: the tokenizer has no end-of-document token"):
        build_loader(config, dataset)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_batches_are_page_locked_where_there_is_a_gpu(dataset: GptDataset) -> None:
    with build_loader(config_of(data_path="unused", num_workers=2), dataset) as loader:
        batch = next(loader)[0]
    assert batch.tokens.is_pinned()
    assert batch.loss_mask.is_pinned()
    assert torch.equal(batch.to("cuda").tokens.cpu(), batch.tokens)
