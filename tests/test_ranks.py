"""The harness itself: results in order, failures with their traceback, no rank left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def test_results_come_back_in_order_of_rank():
    def add(x):
        total = torch.tensor([float(dist.get_rank() + x)])
        dist.all_reduce(total)
        return dist.get_rank(), total.item()

    assert run_ranks(2, add, 10) == [(0, 21.0), (1, 21.0)]


def test_backward_works_in_a_fork_of_a_process_that_ran_backward():
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()

    def step():
        weight.grad = None
        (weight * 3).sum().backward()
        return weight.grad.tolist()

    assert run_ranks(1, step) == [[3.0, 3.0, 3.0]]


def test_the_failing_rank_is_named_and_the_waiting_one_is_killed():
    def fail():
        if dist.get_rank() == 1:
            raise ValueError("one is bad")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(ValueError, match="one is bad") as caught:
        run_ranks(2, fail, timeout=30)
    assert time.monotonic() - start < 15
    assert "on rank 1" in "".join(caught.value.__notes__)
    assert "raise ValueError" in "".join(caught.value.__notes__)


def test_a_rank_that_dies_or_hangs_is_an_error():
    with pytest.raises(RankError, match="rank 0 died, exit status 7"):
        run_ranks(1, os._exit, 7)
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 had not answered"):
        run_ranks(1, time.sleep, 60, timeout=2)
