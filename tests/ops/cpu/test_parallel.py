"""A thread of a kernel that finds no memory says so, and ends the process: its part cannot be done again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron.ops.cpu import library

BEGIN = """
import resource
from pathlib import Path

import torch

from megatron.ops.cpu.flash import flash_attention
from megatron.ops.cpu.library import make_ready
from megatron.ops.cpu.product import multiply
from megatron.ops.sight import Sight

assert not make_ready(torch.device("cpu"))
torch.set_num_threads(1)
few, many, sight = torch.zeros(1, 1, 96, 64), torch.zeros(1, 1, 60000, 64), Sight(0.1)
sight.bounds(96, 60000, few.device)
left, output = torch.zeros(96, 96), torch.zeros(96, 96)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20,) * 2)
"""
CALLS = ["flash_attention(few, many, many, sight)", "multiply(output, left, left)"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_without_memory_says_so(call: str) -> None:
    assert library.make_ready(torch.device("cpu")) == ""
    ended = subprocess.run([sys.executable, "-c", BEGIN + call], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "deepy: a C++ kernel on a CPU found no memory for its copies"
    assert ended.returncode < 0
