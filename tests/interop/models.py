"""Small random Hugging Face models, and small checkpoints of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from megatron.checkpoint.save import save_checkpoint
from megatron.config.resolve import resolve
from megatron.model.build import build_model
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece
from megatron.tokenizer.build import build_tokenizer

ROWS = 384


def gpt_neox(**keys: Any) -> PreTrainedModel:
    values = {
        "vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return _random(GPTNeoXForCausalLM(GPTNeoXConfig(**{**values, **keys})))


def llama(**keys: Any) -> PreTrainedModel:
    values = {
        "vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 88, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return _random(LlamaForCausalLM(LlamaConfig(**{**values, **keys})))


def gpt2(**keys: Any) -> PreTrainedModel:
    values = {
        "vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return _random(GPT2LMHeadModel(GPT2Config(**{**values, **keys})))


def _random(model: PreTrainedModel) -> PreTrainedModel:
    """Fill norms and biases too, which start at 1 and 0 and would hide what is lost."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_tokenizer(path: Path) -> Path:
    """Train a byte-level BPE with fewer ids than ROWS on a few lines."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["the capital of France is Paris", "def factorial(n): return n"] * 20, trainer)
    backend.save(str(path))
    return path


def save_model(root: Path, masters: bool = False, iteration: int = 7, **keys: Any) -> Path:
    """Save a model of ours with random weights everywhere as a checkpoint, its vocabulary padded to ROWS."""
    flat = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 48, "max_position_embeddings": 48,
        "pos_emb": "rotary", "no_weight_tying": True, "train_iters": 10, "lr_decay_iters": 10,
        "optimizer": {"type": "adam", "params": {"lr": 0.001}},
    }  # fmt: skip
    if "vocab_file" in keys:
        flat["tokenizer_type"] = "HFTokenizer"
    config = resolve({**flat, **keys})
    model = build_model(config, ROWS, Mesh.single())
    torch.manual_seed(2)
    pieces = []
    for name, parameter in model.named_parameters():
        master = (parameter.detach().float() + 0.2 * torch.randn(parameter.shape)).reshape(-1)
        shape = tuple(parameter.shape)
        pieces.append(StatePiece(name, "weight", shape, 0, master.to(parameter.dtype)))
        if masters:
            pieces.append(StatePiece(name, "master", shape, 0, master))
    extra: dict[str, Any] = {}
    if "vocab_file" in keys:
        tokenizer = build_tokenizer(config.tokenizer)
        extra["tokenizer"] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint()}
    progress = {"iteration": iteration, "consumed_samples": 56, "consumed_tokens": 2688, "skipped_iterations": 0}
    return save_checkpoint(root, iteration, pieces, progress, config, extra, Mesh.single())
