"""Steps that are replayed equal those that are not, bit for bit, whatever changes between them.

On a CPU the recordings are those of `tape.py`: nothing that a replay does is Python. On a GPU they are CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.data.batch import Batch
from megatron.engine import graphs, recorded
from megatron.engine.base import NO_LIMITS, Limits
from megatron.engine.local import LocalEngine
from megatron.engine.recorded import RecordedEngine
from megatron.engine.wishes import Wish
from tests.ranks import preload, run_ranks

preload()
from tests.engine import tiny  # noqa: E402
from tests.engine.sources import Tensors  # noqa: E402
from tests.engine.tape import TapeRecorder  # noqa: E402
from tests.engine.test_no_waiting import reads  # noqa: E402

STEPS = 12
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NEVER = 10**9


class Dropped(tiny.TinyModel):
    """The tiny model with dropout, whose masks follow from the iteration; segments are taken and not looked at."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = F.dropout(self.embedding(tokens), 0.2, self.training)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return F.cross_entropy(self.head(hidden).float().transpose(1, 2), labels, reduction="none")


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "recorder_of", lambda config, mesh: TapeRecorder())
    TapeRecorder.forget()


def make(config: Any, warm_up: int = 3) -> Any:
    """Return an engine; warm_up: NEVER for one that records nothing."""
    graphs.WARM_UP = warm_up
    engine = tiny.make_engine(config, Dropped())
    assert isinstance(engine, RecordedEngine)
    return engine


@pytest.fixture(autouse=True)
def warm_up_again() -> Iterator[None]:
    yield
    graphs.WARM_UP = 3


def configured(**keys: Any) -> Any:
    return tiny.config(cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=1, **keys)


def limits_of(step: int) -> Limits:
    """Limits of a step: some refuse it by its loss, some by its norm, most nothing."""
    return {5: Limits(loss=1e-3), 7: Limits(grad_norm=1e-6), 9: Limits(100.0, 100.0)}.get(step, NO_LIMITS)


def run(engine: Any, config: Any, steps: range = range(STEPS), limits: Callable[[int], Limits] = limits_of) -> Any:
    """Queue steps, read them late, and return their results and the state; the wishes change too."""
    pending = []
    for step in steps:
        wishes = {Wish.SAVE} if step % 3 == 1 else set()
        batches = tiny.micro_batches(config, step, engine._mesh)
        pending.append(engine.queue_step(batches, step, lambda wishes=wishes: wishes, limits(step)))
    engine.check_masters()
    return [each.read() for each in pending], tiny.full_state(engine)


def both(config: Any, **keys: Any) -> tuple[Any, Any]:
    """Return what an engine does that replays, and what one does that records nothing."""
    found = []
    for warm_up in (3, NEVER):
        engine = make(config, warm_up)
        found.append(run(engine, config, **keys))
    return found[0], found[1]


def assert_same(found: Any, expected: Any) -> None:
    assert repr(found[0]) == repr(expected[0])  # an infinite norm, clipped, is no number
    assert len(found[1]) == len(expected[1]) > 0
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours[:4] == theirs[:4]
        assert torch.equal(ours[4], theirs[4]), ours[:2]


PRECISIONS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}},
    "unclipped": {"gradient_clipping": 0.0},
}


@pytest.mark.parametrize("case", PRECISIONS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_steps_equal_others_bit_for_bit(case: str, micro_batches: int) -> None:
    """With another rate, batch, mask of dropout, limit and loss scale in each step; some steps are left out."""
    config = tiny.config(
        cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=micro_batches, **PRECISIONS[case]
    )
    found, expected = both(config)
    assert_same(found, expected)
    pieces = 1 if micro_batches == 1 else 3
    assert TapeRecorder.recordings == pieces
    first_others = {1: 0, 3: 2 * STEPS}[micro_batches]
    assert TapeRecorder.replays == pieces * (STEPS - 3) + max(0, first_others - 3 - (STEPS - 3))
    results = found[0]
    assert all(one.learning_rate != other.learning_rate for one, other in pairwise(results[3:]))
    finite = [step for step, each in enumerate(results) if each.grad_norm < math.inf]
    assert [step for step in finite if results[step].spiked] == [step for step in finite if step in (5, 7)] != []
    assert all(each.wishes == ({Wish.SAVE} if step % 3 == 1 else set()) for step, each in enumerate(results))
    if case == "fp16":
        assert len({each.loss_scale for each in results[3:]}) > 1, "no replay changed the loss scale"
        assert any(each.skipped and not each.spiked for each in results)
    if case == "bf16":
        assert any(each.clipped_grad_norm < each.grad_norm for each in results[3:])


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lion": {},
    "madgrad_wd": {},
    "sm3": {"momentum": 0.9},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_is_recorded(kind: str) -> None:
    optimizer = {"type": kind, "params": {"lr": 1e-3, **OPTIMIZERS[kind]}}
    config = configured(optimizer=optimizer, precision="bf16", weight_decay=0.0 if kind == "sm3" else 0.1)
    assert_same(*both(config))
    assert TapeRecorder.recordings == 1


def test_two_replicas_record_their_passes_and_the_update() -> None:
    """The sum over the ranks stays between the recordings."""

    def on_a_rank() -> Any:
        graphs.WARM_UP = 3
        config = tiny.config(2, cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=1)
        found, expected = both(config)
        return found, expected, TapeRecorder.recordings

    for found, expected, recordings in run_ranks(2, on_a_rank):
        assert_same(found, expected)
        assert recordings == 2


def test_the_plain_engine_does_the_same_steps() -> None:
    """All but the rounding of the learning rate to fp32, and the order of the norm's sum."""
    ones, others = (
        run(engine, config)
        for config in (configured(precision="bf16"), tiny.config(gradient_accumulation_steps=1, precision="bf16"))
        for engine in [tiny.make_engine(config, Dropped())]
    )
    for one, other in zip(ones[0], others[0], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)
        assert one.spiked == other.spiked


def test_a_number_of_the_host_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a learning rate of the host is the one of the recording for ever."""
    monkeypatch.setattr(RecordedEngine, "_start", LocalEngine._start)
    found, expected = both(configured())
    assert found[0][:4] == expected[0][:4], "the first replay has the rate of the recording"
    assert found[0][5:] != expected[0][5:]


def test_what_waits_for_the_device_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**PRECISIONS["fp16"])
    monkeypatch.setattr(RecordedEngine, "_loss_scale", lambda self: float(self._scaler.cur_scale))
    with pytest.raises(RuntimeError, match="waits for the device"):
        run(make(config), config)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_replayed_step_reads_nothing(micro_batches: int) -> None:
    config = tiny.config(cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=micro_batches)
    engine = make(config)
    steps = [tiny.micro_batches(config, step, engine._mesh) for step in range(STEPS)]
    for step in range(5):
        engine.train_step(steps[step], step)
    before = TapeRecorder.replays
    assert not reads(lambda: [engine.queue_step(steps[step], step, limits=limits_of(step)) for step in range(5, 10)])
    assert TapeRecorder.replays == before + 5 * (3 if micro_batches > 1 else 1)


def short(batch: Batch) -> Batch:
    return Batch(*(each[:, :4] for each in (batch.tokens, batch.labels, batch.loss_mask)))


def documents(batch: Batch) -> Batch:
    return replace(batch, segments=torch.zeros_like(batch.tokens))


def load(engine: Any, config: Any) -> None:
    """Load the state of another run."""
    graphs.WARM_UP, before = NEVER, graphs.WARM_UP
    state = tiny.merge([tiny.full_state(run_from(config))])
    graphs.WARM_UP = before
    engine.load_state(Tensors(state), with_optimizer=True)


def run_from(config: Any) -> Any:
    other = tiny.make_engine(config, Dropped())
    tiny.train(other, config, 20, 22)
    return other


def watch(engine: Any, config: Any) -> None:
    """Let somebody see the gradients of one step."""
    seen: list[str] = []
    engine.watch_gradients(lambda name, gradient: seen.append(name))
    engine.train_step(tiny.micro_batches(config, 30, engine._mesh), 30)
    engine._watcher = None
    assert len(seen) == len(list(engine.model.parameters()))


def train_on(change: Callable[[Batch], Batch]) -> Callable[[Any, Any], None]:
    return lambda engine, config: engine.train_step(
        [change(batch) for batch in tiny.micro_batches(config, 30, engine._mesh)], 30
    )


def evaluate(change: Callable[[Batch], Batch] = lambda batch: batch) -> Callable[[Any, Any], Any]:
    return lambda engine, config: engine.evaluate(
        [change(batch) for batch in tiny.micro_batches(config, 30, engine._mesh)]
    )


HAPPENINGS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "an examined step": (
        lambda engine, config: engine.examine(tiny.micro_batches(config, 30, engine._mesh), 30),
        False,
    ),
    "a watched step": (watch, False),
    "a validation": (evaluate(), False),
    "a comparison of replicas": (lambda engine, config: engine.check_replicas(), False),
    "a checkpoint that is saved": (lambda engine, config: tiny.full_state(engine), False),
    "a batch of another shape": (train_on(short), True),
    "a batch with documents": (train_on(documents), True),
    "a validation of another length": (evaluate(short), True),
    "a validation with documents": (evaluate(documents), True),
    "a checkpoint that is loaded": (load, True),
}


@pytest.mark.parametrize("name", HAPPENINGS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_happens_between_steps(name: str, micro_batches: int) -> None:
    """Steps behind it are those of an engine that records nothing, and replays, of one recording or another."""
    happen, ends = HAPPENINGS[name]
    config = tiny.config(
        cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=micro_batches, **PRECISIONS["fp16"]
    )
    outcomes = []
    for warm_up in (3, NEVER):
        engine = make(config, warm_up)
        first = run(engine, config, range(5))
        happen(engine, config)
        outcomes.append((first, run(engine, config, range(5, STEPS))))
    for found, expected in zip(*outcomes, strict=True):
        assert_same(found, expected)
    pieces = 1 if micro_batches == 1 else 3
    assert TapeRecorder.recordings == pieces * (2 if ends else 1)
    assert (TapeRecorder.ends > 0) == ends


@pytest.mark.parametrize("name", ["an examined step", "a watched step", "a batch of another shape"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_between_replays_run_where_recordings_are_made(name: str, micro_batches: int) -> None:
    """On a GPU that is their stream, to which the parameters' nodes of the autograd graph belong."""
    config = tiny.config(cuda_graphs=True, optimizer_fusion=False, gradient_accumulation_steps=micro_batches)
    engine = make(config)
    run(engine, config, range(5))
    before = TapeRecorder.warm_ups
    HAPPENINGS[name][0](engine, config)
    update = int(micro_batches > 1 and name == "a batch of another shape")
    assert TapeRecorder.warm_ups == before + micro_batches + update


def test_piece_by_piece_a_recording_is_made_once() -> None:
    recorder, values = TapeRecorder(), torch.zeros(2)
    piece = graphs.Piece(recorder, lambda: values.add_(1) * 2)
    assert [piece().tolist()[0] for _ in range(6)] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert (TapeRecorder.warm_ups, TapeRecorder.recordings, TapeRecorder.replays) == (3, 1, 3)
    assert piece() is piece()
