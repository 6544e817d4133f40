"""Predicted bytes against those of real engines on two data-parallel ranks, by storage."""

import gc
import math
from collections import Counter

import pytest
import torch
from deepspeed.runtime.pipe.schedule import BackwardPass
from torch.autograd.graph import saved_tensors_hooks

from megatron.engine.build import build_engine
from megatron.engine.local import LocalEngine
from megatron.engine.memory import held
from megatron.model import offload
from megatron.model.build import build_model
from megatron.objectives.build import build_objective
from megatron.ops import attention
from megatron.parallel.mesh import Mesh
from megatron.planning.activations import boundary_bytes
from megatron.planning.layout import Layout
from megatron.planning.memory import buffer_bytes, message_bytes, stage_memory, state_bytes, update_bytes
from megatron.planning.stages import stages
from tests.parallel.matrix import make_mesh
from tests.planning.small import BUCKET, VOCAB, Collectives, batch, config, settled, storages
from tests.ranks import run_ranks

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (1, "fp16"), (2, "fp32"), (2, "bf16"), (3, "fp32"),
         (3, "bf16")]  # fmt: skip


def _measure(stage, precision):
    """Return bytes by term on this rank, the total at the fullest collective, and the collectives' payload."""
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True
    gc.collect()
    gc.freeze()  # what exists is none of ours, and slow to look through
    resolved, mesh = config(2, stage, precision=precision), Mesh.create()
    model = build_model(resolved, VOCAB, mesh)
    engine = build_engine(resolved, mesh, model, build_objective())
    engine.train_step([batch(resolved) for _ in range(2)], 0)
    weights = storages(getattr(p, "ds_tensor", p) for p in model.parameters())
    optimizer = engine._optimizer if isinstance(engine, LocalEngine) else engine._live.optimizer.optimizer
    masters = storages(buffer for buffer, _ in engine._holdings().buffers)
    moments = storages(value for state in optimizer.state.values() for value in state.values() if value.dim())
    masters = {address: size for address, size in masters.items() if address not in weights}
    backward = engine._backward
    rest = []

    def measured_backward(*arguments):
        backward(*arguments)
        gc.collect()  # cycles of the engine hold activations that nobody needs
        known = {*weights, *masters, *moments}
        rest.append({address: size for address, size in settled(model).items() if address not in known})

    class Fullest(Collectives):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                self.total = max(self.total, sum(settled(model).values()))
            return super().__torch_dispatch__(func, types, args, kwargs)

    engine._backward = measured_backward
    with Fullest() as collectives:
        engine.train_step([batch(resolved) for _ in range(2)], 1)
    gradients = [size for size in rest[0].values() if size != 4 * BUCKET]
    return {
        "num_parameters": sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters()),
        "weights": sum(weights.values()), "masters": sum(masters.values()), "moments": sum(moments.values()),
        "gradients": sum(gradients),
        "total": collectives.total, "payload": dict(collectives.payload),
    }  # fmt: skip


AT_ONCE = {"optimizer_in_backward": True, "gradient_clipping": 0.0, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(("stage", "keys"), [(0, {}), (1, {}), (3, {"precision": "fp32"}), (0, AT_ONCE)])
def test_moments_in_bf16_and_updates_in_the_backward_pass(stage, keys):
    """What is held between steps, and of gradients in the middle of one."""
    keys = {"moments_dtype": "bf16", **keys}
    resolved = config(2, stage, **keys)
    planned = state_bytes(resolved, Layout.of(resolved), stages(resolved, VOCAB, 1)[0].num_parameters)
    for _, measured in run_ranks(2, _terms, 2, stage, keys):
        for term in ("weights", "masters", "moments"):
            assert measured[term] == pytest.approx(getattr(planned, term), rel=0.05, abs=1), term
    assert (planned.gradients == 0) == ("optimizer_in_backward" in keys)


def test_activations_that_travel_leave_two_blocks(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 0)
    resolved = config(1, offload_activations=True)
    parcels, make = [], offload._Parcel

    def noted(*arguments):
        parcels.append(make(*arguments))
        return parcels[-1]

    monkeypatch.setattr(offload, "_Parcel", noted)
    model = build_model(resolved, VOCAB, Mesh.single())
    data = batch(resolved)
    model(data.tokens, labels=data.labels, loss_mask=data.loss_mask)
    (planned,) = stage_memory(resolved, Layout.of(resolved), stages(resolved, VOCAB, 1), VOCAB)
    (near,) = stage_memory(resolved, Layout.of(config(1)), stages(resolved, VOCAB, 1), VOCAB)
    assert planned.activations + planned.travelling == near.activations
    assert planned.activations == pytest.approx(near.activations * 2 / 8, rel=0.01)
    # one block of the eight stays, and another is on both sides
    assert sum(parcel.nbytes for parcel in parcels) == pytest.approx(planned.travelling * 7 / 6, rel=0.05)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_state_equals_the_tensors_of_the_engine(stage, precision):
    measured = run_ranks(2, _measure, stage, precision)[0]
    resolved = config(2, stage, precision=precision)
    layout, numel = Layout.of(resolved), measured["num_parameters"]
    planned = state_bytes(resolved, layout, numel)
    for term in ("weights", "masters", "moments", "gradients"):
        assert measured[term] == pytest.approx(getattr(planned, term), rel=0.05, abs=1), term
    _check_payload(measured, stage, precision, numel)
    if stage < 2:  # reduced when the backward pass is over
        filled = 4 * BUCKET  # by gradients that are gone from where they were: more or less of it counts twice
        total = planned.total + update_bytes(resolved, layout, numel)
        assert measured["total"] == pytest.approx(total, rel=0.04, abs=filled if stage else 0)
    else:  # reduced within it, beside as many activations as are left
        (whole,) = stage_memory(resolved, layout, stages(resolved, VOCAB, 1), VOCAB, reserve=0)
        assert planned.total + buffer_bytes(resolved, layout, numel) < measured["total"] < whole.backward


def _check_payload(measured, stage, precision, numel):
    weight, passes = {"fp32": 4, "fp16": 2, "bf16": 2}[precision], 2
    gathered = {0: 0, 1: weight, 2: weight, 3: weight * passes}[stage]
    reduced = {0: 4, 1: 4, 2: 4 * passes, 3: 0}[stage]
    scattered = 4 * passes if stage == 3 else 0
    for kind, wanted in (("allgather", gathered), ("allreduce", reduced), ("reduce_scatter", scattered)):
        assert measured["payload"].get(kind, 0) == pytest.approx(wanted * numel, rel=0.01, abs=200), kind


TP = {"model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipe_parallel_size": 2}
CP = {"context_parallel_size": 2}
TIED = {"no_weight_tying": False}

LAYOUTS = {
    # processes, ZeRO stage, keys
    **{f"tensor, ZeRO {stage}": (4, stage, TP) for stage in range(4)},
    "tensor alone": (2, 0, {**TP, "precision": "fp32"}),
    "sequence, ZeRO 1": (4, 1, SP),
    "sequence, parallel residual, ZeRO 3": (2, 3, {**SP, "gpt_j_residual": True}),
    **{f"context, ZeRO {stage}": (2, stage, CP) for stage in range(4)},
    "context beside data, ZeRO 2": (4, 2, CP),
    "context, tensor": (4, 1, {**CP, **TP}),
    "pipeline": (2, 1, PP),
    "pipeline in fp32, tied": (2, 1, {**PP, **TIED, "precision": "fp32"}),
    "pipeline beside data, tied": (4, 1, {**PP, **TIED}),
    "pipeline of four": (4, 1, {"pipe_parallel_size": 4, "gradient_accumulation_steps": 6}),
    "pipeline, tensor": (4, 1, {**PP, **TP, **TIED}),
    "pipeline, sequence, recomputed": (4, 1, {**PP, **SP, "checkpoint_activations": True}),
    "pipeline, context": (4, 1, {**PP, **CP}),
}


class _Kept:
    """Bytes that autograd keeps at once between forward and backward passes, by storage, parameters apart."""

    def __init__(self, model):
        self.parameters = storages(model.parameters())
        self.held, self.now, self.most = Counter(), 0, 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def count(self, storage, size, change):
        if storage not in self.parameters:
            before, self.held[storage] = self.held[storage], self.held[storage] + change
            self.now += size * (bool(self.held[storage]) - bool(before))
            self.most = max(self.most, self.now)


class _Held:
    def __init__(self, kept, tensor):
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.place = kept, tensor, (storage.data_ptr(), storage.nbytes())
        kept.count(*self.place, 1)

    def __del__(self):
        self.kept.count(*self.place, -1)


def _terms(processes, stage, keys):
    """Run inside a rank: its pipeline stage and parameters, and the bytes of each term of its state; of a pipeline also
    the most that autograd keeps of its blocks, and the messages that are held beside that."""
    resolved = _config(processes, stage, keys)
    mesh = make_mesh(resolved)
    model = build_model(resolved, VOCAB, mesh)
    engine = build_engine(resolved, mesh, model, build_objective())
    batches = [batch(resolved) for _ in range(resolved.batch.gradient_accumulation_steps)]
    engine.train_step(batches, 0)
    optimizer = engine._optimizer if isinstance(engine, LocalEngine) else engine._live.optimizer.optimizer
    weights = storages(getattr(p, "ds_tensor", p) for p in model.parameters())
    masters = storages(buffer for buffer, _ in engine._holdings().buffers)
    moments = storages(value for state in optimizer.state.values() for value in state.values() if value.dim())
    found = {
        "num_parameters": sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters()),
        "weights": sum(weights.values()),
        "masters": sum(size for address, size in masters.items() if address not in weights),
        "moments": sum(moments.values()),
    }
    if mesh.pp.size > 1:
        found |= _in_flight(engine, batches)
    return mesh.pp.rank, found


def _in_flight(engine, batches):
    """Return what a step of a pipeline keeps of its blocks, its messages, and its gradients."""
    attention._trains_on_cpu = lambda query: False  # a plan is for GPUs, whose attention is PyTorch's
    live, model, kept = engine._live, engine.model, _Kept(engine.model)
    messages, gradients = [], []
    for name, block in model.named_modules():
        if name.startswith("layers.") and name.count(".") == 1:
            block.forward = _watched(block.forward, kept)
    backward = live._INSTRUCTION_MAP[BackwardPass]

    def measured_backward(live, **settings):
        held = [value for key in ("inputs", "outputs") for value in live.pipe_buffers[key]]
        received = [*(live.pipe_recv_buf or ()), *(live.grad_layer or ())]
        flat = [
            tensor
            for value in (*held, received)
            for tensor in (value if isinstance(value, (tuple, list)) else (value,))
        ]
        messages.append(sum(storages(t for t in flat if t is not None and t.is_floating_point() and t.dim()).values()))
        backward(live, **settings)
        places = ("grad", "grad_accum", "_hp_grad")
        gradients.append(sum(storages(getattr(p, name, None) for p in model.parameters() for name in places).values()))

    live._INSTRUCTION_MAP = {**live._INSTRUCTION_MAP, BackwardPass: measured_backward}
    engine.train_step(batches, 1)
    return {"activations": kept.most, "messages": max(messages), "gradients": max(gradients)}


def _watched(forward, kept):
    def watched(*inputs):
        with saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            return forward(*inputs)

    return watched


def _config(processes, stage, keys):
    return config(processes, stage, **keys)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rank_holds_what_is_planned(name):
    processes, zero_stage, keys = LAYOUTS[name]
    resolved = _config(processes, zero_stage, keys)
    layout = Layout.of(resolved)
    parts = stages(resolved, VOCAB, layout.pp, layout.tp)
    planned = stage_memory(resolved, layout, parts, VOCAB)
    for index, measured in run_ranks(processes, _terms, processes, zero_stage, keys):
        state = planned[index].state
        assert measured["num_parameters"] == planned[index].num_parameters
        for term in ("weights", "masters", "moments", "gradients"):
            if term in measured:
                assert measured[term] == pytest.approx(getattr(state, term), rel=0.05, abs=1), (index, term)
        if layout.pp > 1 and not layout.recompute:
            assert measured["activations"] == pytest.approx(planned[index].activations, rel=0.05), index
        if layout.pp > 1:
            most = message_bytes(resolved, layout, index)
            assert most - boundary_bytes(resolved, layout) <= measured["messages"] <= most, index


def test_a_gpu_of_each_stage_holds_what_is_in_flight():
    resolved = config(1, num_layers=4, pipe_parallel_size=1)
    layout = Layout(pp=4, accumulation=8, zero_stage=1, micro_batch=2)
    planned = stage_memory(resolved, layout, stages(resolved, VOCAB, 4), VOCAB)
    blocks = [stage.layers[1] - stage.layers[0] + 1 for stage in planned]
    per_block = [stage.activations / count / (4 - stage.stage) for stage, count in zip(planned, blocks, strict=True)]
    assert len(set(per_block)) == 1
    assert [stage.loss > 0 for stage in planned] == [False, False, False, True]


def test_gpt_neox_20b_fits_where_it_was_trained():
    from megatron.config.load import load_config

    resolved = load_config(["configs/20B.yml"], world_size=96, announce=False)
    planned = stage_memory(resolved, Layout.of(resolved), stages(resolved, 50432, 4, 2), 50432)
    assert 15 * 2**30 < max(stage.total for stage in planned) < 40 * 2**30
    assert sum(stage.num_parameters for stage in stages(resolved, 50432, 4)) == 20_554_567_680


def gradients_in_the_update(stage, keys):
    """Run in a process of its own: the bytes of gradients when the backward pass is over."""
    resolved = config(1, stage, **keys)
    mesh = Mesh.create() if stage else Mesh.single()
    engine = build_engine(resolved, mesh, build_model(resolved, VOCAB, mesh), build_objective())
    found, update = [], engine._update

    def measured_update(*arguments):
        found.append(held(engine, torch.device("cpu")).gradients)
        return update(*arguments)

    engine._update = measured_update
    for step in range(2):
        engine.train_step([batch(resolved) for _ in range(resolved.batch.gradient_accumulation_steps)], step)
    return found


@pytest.mark.parametrize("keys", [{}, {"precision": "fp32"}, {"gradient_accumulation_steps": 2}])
def test_gradients_of_zero_3_alone(keys):
    keys = {"gradient_accumulation_steps": 1, "engine": "deepspeed", **keys}
    resolved = config(1, 3, **keys)
    (found,) = run_ranks(1, gradients_in_the_update, 3, keys)
    (planned,) = stage_memory(resolved, Layout.of(resolved), stages(resolved, VOCAB, 1), VOCAB, reserve=0)
    assert planned.gradients_come == (keys["gradient_accumulation_steps"] == 1)
    assert found == [planned.state.gradients] * 2


@pytest.mark.parametrize("keys", [{}, {"precision": "fp32"}, {"precision": "fp16"}, {"gradient_accumulation_steps": 2}])
def test_gradients_of_one_process(keys):
    """Autograd's own where nothing is added to them, which are there only when activations go."""
    resolved = config(1, **{"gradient_accumulation_steps": 1, **keys})
    model = build_model(resolved, VOCAB, Mesh.single())
    engine = build_engine(resolved, Mesh.single(), model, build_objective())
    found, update = [], engine._update

    def measured_update(*arguments):
        found.append(held(engine, torch.device("cpu")).gradients)
        return update(*arguments)

    engine._update = measured_update
    engine.train_step([batch(resolved) for _ in range(resolved.batch.gradient_accumulation_steps)], 0)
    (planned,) = stage_memory(resolved, Layout.of(resolved), stages(resolved, VOCAB, 1), VOCAB, reserve=0)
    assert found == [planned.state.gradients]
    kept, rest = planned.activations + planned.loss, planned.working + planned.buffers
    if keys.get("gradient_accumulation_steps") == 2:
        assert planned.backward == planned.state.total + kept + rest
    else:
        assert planned.backward == planned.state.total - found[0] + max(kept, found[0]) + rest
