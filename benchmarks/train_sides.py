"""What `train.py` measures: each side builds a model of the same weights and returns its step.

    ours        the library's engine: fp32 masters, norm and clipping of the gradient, AdamW. "fused" asks for every
                fused kernel, "compiled" for compiled blocks (on a GPU on top), "recorded" for CUDA graphs
    deepspeed   the same through DeepSpeed's ZeRO stage 1, at world size 1; "deepspeed 2", "deepspeed 3": those stages
    hf          Hugging Face's GPTNeoXForCausalLM in the plain loop: clipping, PyTorch's fused AdamW
    plain       a nanoGPT-style model (plain_gpt.py) in that loop
    litgpt      LitGPT's model and loss in that loop, where it is installed

and hf and plain under torch.compile. All clip, as these programs do unless told otherwise. In bf16 they do what their
own training programs do: fp32 parameters, which are ours' masters, under autocast. "pure" sides train bf16 parameters
without masters instead: 8 bytes for each where ours has 18 with its gradient, and updates below half a percent of a
weight are lost. A side's step returns the loss before its update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.plain_gpt import PlainGPT, plain_weights
from benchmarks.train_sizes import CLIP, OPTIMIZER, ROTARY_SHARE, VOCABULARY, Size, settings
from benchmarks.train_turns import Make, Step
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.data.batch import Batch
from megatron.engine.build import build_engine
from megatron.engine.pending import PendingStep
from megatron.launch.lean import defer_compiler
from megatron.model.build import DTYPES, build_model
from megatron.objectives.build import build_objective
from megatron.ops.compiled import mend_cpp_reductions
from megatron.parallel.mesh import Mesh

Loss = Callable[[Tensor, Tensor], Tensor]
"""(token ids, labels) [b, s] -> mean loss, with a graph."""

_HF_NAMES = {
    "embedding.word_embeddings": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
    "mlp.linear1": "mlp.dense_h_to_4h",
    "mlp.linear2": "mlp.dense_4h_to_h",
    "layers.": "gpt_neox.layers.",
}


def tokens_of(size: Size, device: torch.device) -> Tensor:
    """Return the ids [b, s + 1] that all sides train on."""
    return torch.randint(0, VOCABULARY, (size.rows, size.length + 1), generator=torch.Generator().manual_seed(0)).to(
        device
    )


class _Result:
    """The loss of a step, for which nobody waits before it is read."""

    def __init__(self, pending: PendingStep) -> None:
        self._pending = pending

    def __float__(self) -> float:
        return self._pending.read().loss


def our_weights(size: Size, precision: str, device: torch.device) -> dict[str, Tensor]:
    """Return the initial weights."""
    model = _our_model(resolve(settings(size, precision, on_gpu=False)), Mesh.single(device))
    return {name: parameter.detach().to(DTYPES[precision]) for name, parameter in model.named_parameters()}


def _our_model(config: Config, mesh: Mesh) -> nn.Module:
    """Return our model. On a GPU its weights are drawn there, since a core needs 10 s for a billion of a run's own."""
    if mesh.device.type == "cpu":
        return build_model(config, VOCABULARY, mesh)
    model = build_model(config, VOCABULARY, mesh, initialized=False)
    generator = torch.Generator(mesh.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator, device=mesh.device))
            else:
                weight.fill_(float(name.endswith("weight")))  # of norms; biases are 0
    return model


def ours(size: Size, precision: str, device: torch.device, **keys: Any) -> Step:
    """Return the step of an engine of ours, as a worker of train.py has it. keys: of the config, beside the size's."""
    defer_compiler()
    config = resolve(settings(size, precision, device.type == "cuda") | keys)
    mesh = Mesh.single(device)
    engine = build_engine(config, mesh, _our_model(config, mesh), build_objective())
    tokens = tokens_of(size, device)
    batch = Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(tokens[:, 1:].shape, device=device)
    )
    return lambda: _Result(engine.queue_step([batch], 0))


def through_deepspeed(size: Size, precision: str, device: torch.device, stage: int = 1) -> Step:
    """Return the step of a stage of DeepSpeed's ZeRO in a world of one process."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return ours(size, precision, device, zero_optimization={"stage": stage}, engine="deepspeed")


def hugging_face(size: Size, precision: str, device: torch.device, compiled: bool = False, pure: bool = False) -> Step:
    """Return the step of Hugging Face's model. pure: its parameters are of this precision too."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden, max_position_embeddings=size.length, rotary_pct=ROTARY_SHARE,
        use_parallel_residual=True,
    )  # fmt: skip
    with device:  # not on a CPU, whose numbers come slowly and are not used
        model = GPTNeoXForCausalLM(shape)
    weights = {_renamed(name): weight for name, weight in our_weights(size, precision, device).items()}
    model = _filled(model, weights, precision if pure else "fp32", device)
    called = _compiled(model, device) if compiled else model

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = called(input_ids=ids, labels=labels, shift_labels=labels).loss
        return found

    return _loop(model, _autocast(loss, precision, device, pure), size, device)


def plain(size: Size, precision: str, device: torch.device, compiled: bool = False, pure: bool = False) -> Step:
    """Return the step of the nanoGPT-style model; pure: see `hugging_face`."""
    weights = plain_weights(our_weights(size, precision, device), size.heads)
    with device:
        model = PlainGPT(size, size.length)
    model = _filled(model, weights, precision if pure else "fp32", device)
    called = _compiled(model, device) if compiled else model
    return _loop(model, _autocast(called, precision, device, pure), size, device)


def litgpt(size: Size, precision: str, device: torch.device, pure: bool = False) -> Step:
    """Return the step of LitGPT's model with its own loss; pure: see `hugging_face`.

    Under autocast its logits become fp32 where Fabric makes them so: as they leave the model. Raises ImportError where
    LitGPT is not installed.
    """
    from litgpt.config import Config as LitConfig
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox
    from litgpt.utils import chunked_cross_entropy

    shape = LitConfig.from_name(
        "pythia-14m", n_layer=size.layers, n_head=size.heads, n_embd=size.hidden, block_size=size.length,
        intermediate_size=4 * size.hidden, head_size=size.hidden // size.heads, n_query_groups=size.heads,
        padded_vocab_size=VOCABULARY, rotary_percentage=ROTARY_SHARE,
    )  # fmt: skip
    theirs = {_renamed(name): weight for name, weight in our_weights(size, precision, device).items()}
    theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    weights: dict[str, Tensor] = {}
    copy_weights_gpt_neox(shape, weights, theirs)
    with device:
        model = GPT(shape)
    model = _filled(model, weights, precision if pure else "fp32", device)
    if pure:
        return _loop(model, lambda ids, labels: chunked_cross_entropy(model(ids), labels), size, device)
    called = _autocast(model, precision, device)
    return _loop(model, lambda ids, labels: chunked_cross_entropy(called(ids).float(), labels), size, device)


FUSED = dict.fromkeys(
    ("layernorm_fusion", "rope_fusion", "activation_fusion", "cross_entropy_fusion", "optimizer_fusion"), True
)
SIDES: Mapping[str, Make] = {
    "ours": ours,
    "ours fused": lambda *where: ours(*where, **FUSED),
    "ours compiled": lambda *where: ours(*where, **(FUSED if where[2].type == "cuda" else {}), compile=True),
    "ours recorded": lambda *where: ours(*where, **FUSED, cuda_graphs=True),
    "deepspeed": through_deepspeed,
    "deepspeed 2": lambda *where: through_deepspeed(*where, stage=2),
    "deepspeed 3": lambda *where: through_deepspeed(*where, stage=3),
    "hf": hugging_face,
    "hf compiled": lambda *where: hugging_face(*where, compiled=True),
    "hf pure": lambda *where: hugging_face(*where, pure=True),
    "plain": plain,
    "plain compiled": lambda *where: plain(*where, compiled=True),
    "plain pure": lambda *where: plain(*where, pure=True),
    "litgpt": litgpt,
    "litgpt pure": lambda *where: litgpt(*where, pure=True),
}


def _autocast(
    called: Callable[..., Tensor], precision: str, device: torch.device, pure: bool = False
) -> Callable[..., Tensor]:
    """Return the function, computing in this precision on fp32 parameters; itself where they have it already."""
    if pure or precision == "fp32":
        return called

    def computed(*inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPES[precision]):
            return called(*inputs)

    return computed


def _compiled(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    if device.type == "cpu":
        mend_cpp_reductions()  # without it PyTorch 2.13 cannot compile them in bf16 there
    called: Callable[..., Any] = torch.compile(model)
    return called


def _filled(model: nn.Module, weights: Mapping[str, Tensor], precision: str, device: torch.device) -> nn.Module:
    model = model.to(device, DTYPES[precision])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = {name for name, _ in model.named_parameters()}
    if unexpected or own & set(missing):
        raise ValueError(f"weights do not fit: {sorted(own & set(missing))} missing, {unexpected} unexpected")
    return model.train()


def _loop(model: nn.Module, loss_of: Loss, size: Size, device: torch.device) -> Step:
    tokens = tokens_of(size, device)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True, **OPTIMIZER)

    def step() -> Tensor:
        loss = loss_of(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _renamed(name: str) -> str:
    for ours_, theirs in _HF_NAMES.items():
        name = name.replace(ours_, theirs)
    return name
