"""`./deepy.py generate.py configs/x.yml -i prompts.txt -o out.jsonl`: a config in, a file of samples out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron import logs
from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.generation.generate import DecodingSettings, Sample, generate
from megatron.generation.load import Trained, load_trained
from megatron.generation.prompts import ask, read_prompts
from megatron.generation.records import write_records
from megatron.generation.sampling import SamplingSettings
from megatron.parallel.mesh import Mesh

logger = logs.get_logger(__name__)


def run_generation(config: Config, mesh: Mesh | None = None) -> list[Sample]:
    """Generate as the config's generation keys say, and return the samples.

    mesh: its tensor axis shares the model, and all its ranks call this; rank 0 reads from the terminal, and writes.

    Of the config only `load` (or `save`), `iteration`, the generation keys and `seed` count: the model and its
    tokenizer are those of the checkpoint. Samples go to `sample_output_file`, or to the screen in interactive mode.
    Raises ConfigError where neither load nor save is set, and what loading and writing raise.
    """
    mesh = mesh or Mesh.single()
    trained = load_trained(_root(config), config.checkpoint.iteration, mesh=mesh)
    settings = decoding_settings(config, trained)
    if config.generation.text_gen_type == "interactive":
        return _talk(trained, settings, config.generation.prompt_end, mesh)
    prompts = read_prompts(config.generation)
    started = time.perf_counter()
    samples = generate(trained.model, trained.tokenizer, prompts, settings)
    seconds = time.perf_counter() - started
    path = Path(config.generation.sample_output_file)
    if mesh.world.rank == 0:
        write_records(path, samples)
    tokens = sum(len(sample.tokens) for sample in samples)
    logger.info("%d samples, %d tokens in %.1f s -> %s", len(samples), tokens, seconds, path)
    return samples


def _root(config: Config) -> str:
    root = config.checkpoint.load or config.checkpoint.save
    if root is None:
        why = "Generation needs a trained model."
        raise ConfigError(Problem("load is not set", why, "Set load to the folder that the training run saved to."))
    return root


def decoding_settings(config: Config, trained: Trained) -> DecodingSettings:
    """Return how to decode: the user's generation keys and seed, within the trained model's context."""
    keys = config.generation
    return DecodingSettings(
        model=trained.config.model,
        sampling=SamplingSettings(keys.temperature, keys.top_k, keys.top_p),
        maximum_tokens=keys.maximum_tokens,
        recompute=keys.recompute,
        seed=config.numerics.seed,
    )


def _talk(trained: Trained, settings: DecodingSettings, prompt_end: str, mesh: Mesh) -> list[Sample]:
    """Answer prompts from the terminal until it ends."""
    samples: list[Sample] = []
    asked = ask(prompt_end, sys.stdin, sys.stdout) if mesh.world.rank == 0 else iter(())
    while (prompt := _next_for_all(asked, mesh)) is not None:
        turn = replace(settings, seed=settings.seed + len(samples))  # the same question again gets another answer
        (sample,) = generate(trained.model, trained.tokenizer, [prompt], turn)
        if mesh.world.rank == 0:
            sys.stdout.write(f"{sample.context}{sample.text}\n")
        samples.append(sample)
    return samples


def _next_for_all(prompts: Iterator[str], mesh: Mesh) -> str | None:
    """Return rank 0's next prompt on all ranks, None after the last."""
    prompt = [next(prompts, None)]
    if mesh.world.size > 1:
        dist.broadcast_object_list(prompt, src=0, group=mesh.world.group, device=mesh.device)
    return prompt[0]
