"""What the library runs on a CPU by `auto`, beside the same written plainly with PyTorch (`plain_torch.py`).

Both sides of a pair take turns on the same inputs, forward and backward, in fp32 and in bf16; what is judged is the
ratio of their medians. Equal is 1.0: several pairs are the same function of PyTorch on both sides. Two medians of one
function differ by up to 5 % on quiet cores, so that a pair misses its aim below 0.95 of it, in time and in processor
time, which neighbours change less; and it is measured again, up to three times, before it counts: the best round is
taken. Malloc keeps what is freed, as in a run, for both sides.

`kernels.py` runs this. `python benchmarks/beside_torch.py ours float32 2048` prints the bytes by which the memory of a
process grows in a linear map with cross entropy, forward and backward; `plain` instead of `ours` for PyTorch's.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import plain_torch
from megatron.malloc import keep_freed_memory
from megatron.ops import adamw, cross_entropy, heads, rotary
from megatron.ops.catalogue import CATALOGUE
from megatron.ops.choice import Choices, Function, Situation, choose
from megatron.ops.measured import fastest

Call = Callable[[], object]
NOISE = 0.05
ROUNDS = 3
VOCABULARY = 50304
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Pair:
    """One comparison. aim: times as fast as PyTorch. turns: measurements of each side in a round."""

    name: str
    ours: Call
    plain: Call
    aim: float = 1.0
    turns: int = 11


@dataclass(frozen=True)
class Compared:
    """A pair's result. ours, plain: median milliseconds; the same of processor time; ratios are plain / ours."""

    name: str
    dtype: str
    threads: int
    ours: float
    plain: float
    aim: float
    ours_busy: float
    plain_busy: float

    @property
    def ratio(self) -> float:
        """Times as fast as PyTorch."""
        return self.plain / self.ours

    @property
    def ratio_of_processor_time(self) -> float:
        """The same by the time that all threads were at work."""
        return self.plain_busy / self.ours_busy

    @property
    def is_short(self) -> bool:
        """Whether it misses its aim by more than noise."""
        return max(self.ratio, self.ratio_of_processor_time) < self.aim * (1 - NOISE)

    def miss(self) -> str:
        """Return a line that says so."""
        return f"{self.name}, {self.dtype}, {self.threads} threads: {self.ratio:.2f} times PyTorch, aim {self.aim}"


class Draws:
    """Inputs of one dtype, the same in every run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return a leaf of normally distributed values."""
        values = torch.empty(shape, dtype=self.dtype).normal_(std=std, generator=self._generator)
        return values.requires_grad_()


def trained(function: Callable[..., Tensor | tuple[Tensor, ...]], *leaves: Tensor) -> Call:
    """Return a call of the function with its backward pass into all leaves."""
    upstream: list[Tensor] = []

    def call() -> None:
        result = function(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not upstream:
            upstream.extend(torch.ones_like(output) for output in outputs)
        torch.autograd.grad(outputs, leaves, upstream)

    return call


def chosen(dtype: torch.dtype, hidden: int, *operations: str) -> Choices:
    """Return what `auto` takes for operations on a CPU."""
    situation = Situation(torch.device("cpu"), dtype, hidden)
    return choose(dict.fromkeys(operations, "auto"), situation, CATALOGUE, fastest)


def chosen_one(dtype: torch.dtype, hidden: int, operation: str) -> Function:
    """Return the function that `auto` takes for an operation on a CPU."""
    return chosen(dtype, hidden, operation).choices[0].function


def norm_pairs(draw: Draws, tokens: int, hidden: int) -> Iterator[Pair]:
    """Norms, by themselves and with the residual's addition."""
    inputs, residual, weight, bias = draw(tokens, hidden), draw(tokens, hidden), draw(hidden), draw(hidden)
    layer_norm, rms_norm, add_layer_norm, add_rms_norm = (
        chosen_one(draw.dtype, hidden, name) for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    )
    yield Pair(
        "layer_norm",
        trained(lambda x, w, b: layer_norm(x, (hidden,), w, b, 1e-5), inputs, weight, bias),
        trained(plain_torch.layer_norm, inputs, weight, bias),
    )
    yield Pair(
        "rms_norm",
        trained(lambda x, w: rms_norm(x, w, 1e-5), inputs, weight),
        trained(plain_torch.rms_norm, inputs, weight),
    )
    yield Pair(
        "add_layer_norm",
        trained(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5), inputs, residual, weight, bias),
        trained(plain_torch.add_layer_norm, inputs, residual, weight, bias),
    )
    yield Pair(
        "add_rms_norm",
        trained(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), inputs, residual, weight),
        trained(plain_torch.add_rms_norm, inputs, residual, weight),
    )


def element_wise_pairs(draw: Draws, tokens: int, hidden: int) -> Iterator[Pair]:
    """Activations of the MLP's width, dropout with the residual's addition, and the rotary embedding."""
    wide, bias, both = draw(tokens, 4 * hidden), draw(4 * hidden), draw(tokens, 8 * hidden)
    branch, residual = draw(tokens, hidden), draw(tokens, hidden)
    for name in ("bias_gelu", "bias_gelu_tanh"):
        ours, plain = chosen_one(draw.dtype, hidden, name), getattr(plain_torch, name)
        yield Pair(name, trained(ours, wide, bias), trained(plain, wide, bias))
    for name, plain in (("swiglu", plain_torch.swiglu), ("geglu", plain_torch.geglu)):
        gated = partial(chosen_one(draw.dtype, hidden, f"bias_{name}"), bias=None)
        yield Pair(name, trained(gated, both), trained(plain, both))
    add_dropped = chosen_one(draw.dtype, hidden, "add_dropped")
    yield Pair(
        "dropout + residual",
        trained(lambda x, r: add_dropped(x, None, r, 0.1), branch, residual),
        trained(plain_torch.add_dropped, branch, residual),
    )
    length = tokens // 2
    packed = draw(2, length, hidden // 64, 3, 64)
    cos, sin = rotary.rotary_tables(torch.arange(length), 64, 10000.0)
    angles = [torch.cat((table, table), dim=-1).to(draw.dtype) for table in (cos, sin)]
    rotate = chosen(draw.dtype, hidden, "rotate_packed").fused("rotate_packed") or heads.split_heads
    yield Pair(
        "rotary",
        trained(lambda p: rotate(p, cos[:, None, None], sin[:, None, None]), packed),
        trained(lambda p: plain_torch.rotary(p, *angles), packed),
    )


def softmax_pairs(draw: Draws, tokens: int, hidden: int) -> Iterator[Pair]:
    """Causal attention weights of rows of up to 512 tokens; ours are not rounded before they are done."""
    length = min(512, tokens)
    scores = draw(tokens // length, hidden // 64, length, length)
    is_hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    masked_softmax = chosen_one(draw.dtype, hidden, "masked_softmax")
    yield Pair(
        "causal softmax",
        trained(lambda s: masked_softmax(s, 0.125, causal=True), scores),
        trained(lambda s: plain_torch.causal_softmax(s, is_hidden), scores),
        turns=5,
    )


def loss_pairs(draw: Draws, tokens: int, hidden: int) -> Iterator[Pair]:
    """Cross entropy of logits that are there, and together with the product that makes them."""
    yield logits_loss_pair(draw, tokens)
    yield linear_loss_pair(draw, tokens, hidden)


def logits_loss_pair(draw: Draws, tokens: int) -> Pair:
    """The loss of logits and their gradients, ours in the logits' own memory."""
    labels = torch.arange(tokens) * 7919 % VOCABULARY
    logits, losses = draw(tokens, VOCABULARY), torch.empty(tokens)
    own, block_losses = logits.detach().clone(), chosen_one(draw.dtype, VOCABULARY, "cross_entropy")
    return Pair(
        "cross_entropy",
        lambda: cross_entropy.losses_in_blocks(own, labels, 1.0, block_losses, losses),
        trained(lambda x: plain_torch.cross_entropy(x, labels), logits),
        aim=1.5,
        turns=5,
    )


def linear_loss_pair(draw: Draws, tokens: int, hidden: int) -> Pair:
    """The projection onto the vocabulary with its loss."""
    labels = torch.arange(tokens) * 7919 % VOCABULARY
    states, weight, mask = draw(tokens, hidden), draw(VOCABULARY, hidden, std=0.02), torch.ones(tokens)
    block_losses = chosen_one(draw.dtype, hidden, "cross_entropy")

    def ours() -> None:
        cross_entropy.linear_cross_entropy_sum(states, weight, labels, mask, block_losses).backward()
        states.grad = None
        weight.grad = None

    def plain() -> None:
        plain_torch.linear_cross_entropy(states, weight, labels).backward()
        states.grad = weight.grad = None

    return Pair("linear + cross_entropy", ours, plain, turns=3)


def optimizer_pairs(draw: Draws, tokens: int, hidden: int) -> Iterator[Pair]:
    """Clipping and AdamW on 16 fp32 tensors; in bf16 each has a rounded weight beside it, as the engine has."""
    masters = [torch.rand(tokens // 4, hidden).requires_grad_() for _ in range(16)]
    for master in masters:
        master.grad = torch.rand(master.shape)
    weights = [master.detach().bfloat16() for master in masters] if draw.dtype == torch.bfloat16 else []
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    optimizer.step()
    states = [optimizer.state[master] for master in masters]
    lists = [[m.grad for m in masters], [m.detach() for m in masters], *([s[k] for s in states] for k in _MOMENTS)]
    step = torch.tensor(10.0)
    sum_of_squares, adamw_update_ = (
        chosen_one(draw.dtype, hidden, name) for name in ("sum_of_squares", "adamw_update_")
    )

    def ours() -> None:
        norm = sum_of_squares(lists[0]).sqrt()
        factor = adamw.coefficient_of(norm, 1.0, 1.0)
        adamw_update_(*lists, weights, factor, step, 1e-4, 0.9, 0.999, 1e-8, 0.01)

    def plain() -> None:
        plain_torch.adamw(optimizer, masters)
        for weight, master in zip(weights, masters, strict=bool(weights)):
            weight.copy_(master.detach())

    yield Pair("clip + AdamW", ours, plain)


_MOMENTS = ("exp_avg", "exp_avg_sq")
MAKERS = (norm_pairs, element_wise_pairs, softmax_pairs, loss_pairs, optimizer_pairs)


def compare(pair: Pair, dtype: torch.dtype) -> Compared:
    """Let both sides take turns; a miss is measured again."""
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    rounds: list[Compared] = []
    for _ in range(ROUNDS):
        (ours, ours_busy), (plain, plain_busy) = _medians(pair)
        rounds.append(Compared(pair.name, name, threads, ours, plain, pair.aim, ours_busy, plain_busy))
        if not rounds[-1].is_short:
            break
    return max(rounds, key=lambda each: each.ratio)


def _medians(pair: Pair) -> list[tuple[float, float]]:
    """Return, of ours and of the plain one, the median milliseconds and those of processor time."""
    sides = (pair.ours, pair.plain)
    times: list[list[tuple[float, float]]] = [[], []]
    for call in sides:
        call()
    for turn in range(pair.turns):
        for side in (0, 1) if turn % 2 else (1, 0):
            begin, busy = time.perf_counter(), time.process_time()
            sides[side]()
            times[side].append((time.perf_counter() - begin, time.process_time() - busy))
    medians = [[1e3 * statistics.median(kind) for kind in zip(*each, strict=True)] for each in times]
    return [(wall, busy) for wall, busy in medians]


def compare_all(tokens: int, hidden: int, threads: int, only: str) -> list[Compared]:
    """Return all pairs whose name contains `only`, at this size."""
    torch.set_num_threads(threads)
    keep_freed_memory("cpu")
    rows = []
    for dtype in DTYPES:
        for maker in MAKERS:
            for pair in maker(Draws(dtype), tokens, hidden):
                if only in pair.name:
                    rows.append(compare(pair, dtype))
                    _show(rows[-1])
    return rows


def _show(row: Compared) -> None:
    aim = "" if row.aim == 1 else f" (aim {row.aim or 'none'})"
    times = f"ours {row.ours:9.2f} ms  PyTorch {row.plain:9.2f} ms"
    ratios = f"{row.ratio:6.2f} times, {row.ratio_of_processor_time:5.2f} by processor time{aim}"
    print(f"{row.name:24} {row.dtype:9} {row.threads} threads  {times}  {ratios}", flush=True)


def grown(side: str, dtype: str, tokens: int) -> int:
    """Return the bytes by which a process of its own grows in a linear map with cross entropy."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, side, dtype, str(tokens)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])


def _grow(side: str, dtype: str, tokens: int) -> int:
    """Return how much more memory this process ever held after one step than before it, beyond the gradient of the
    weight, which both sides must have."""
    draw = Draws(getattr(torch, dtype))
    linear_loss_pair(draw, 8, 8).ours()  # what the libraries allocate once
    pair = linear_loss_pair(draw, tokens, 512)
    before = _peak()
    (pair.ours if side == "ours" else pair.plain)()
    return _peak() - before - VOCABULARY * 512 * draw.dtype.itemsize


def _peak() -> int:
    """Return the most bytes that this process ever held; Linux's getrusage counts those of its parent before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(_grow(sys.argv[1], sys.argv[2], int(sys.argv[3])))
