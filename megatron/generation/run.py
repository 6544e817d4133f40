"""`./deepy.py generate.py configs/x.yml -i prompts.txt -o out.jsonl`: a config in, a file of samples out."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron import logs
from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem
from megatron.generation.generate import DecodingSettings, Sample, generate
from megatron.generation.load import Trained, load_trained
from megatron.generation.prompts import ask, read_prompts
from megatron.generation.records import write_records
from megatron.generation.sampling import SamplingSettings

logger = logs.get_logger(__name__)


def run_generation(config: Config, device: str | torch.device = "cpu") -> list[Sample]:
    """Generate as the config's generation keys say, and return the samples; one process does all.

    Of the config only `load` (or `save`), `iteration`, the generation keys and `seed` count: the model and its
    tokenizer are those of the checkpoint. Samples go to `sample_output_file`, or to the screen in interactive mode.
    Raises ConfigError where neither load nor save is set, and what loading and writing raise.
    """
    trained = load_trained(_root(config), config.checkpoint.iteration, device)
    settings = decoding_settings(config, trained)
    if config.generation.text_gen_type == "interactive":
        return _talk(trained, settings, config.generation.prompt_end)
    prompts = read_prompts(config.generation)
    started = time.perf_counter()
    samples = generate(trained.model, trained.tokenizer, prompts, settings)
    seconds = time.perf_counter() - started
    path = Path(config.generation.sample_output_file)
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


def _talk(trained: Trained, settings: DecodingSettings, prompt_end: str) -> list[Sample]:
    """Answer prompts from the terminal until it ends."""
    samples: list[Sample] = []
    for prompt in ask(prompt_end, sys.stdin, sys.stdout):
        turn = replace(settings, seed=settings.seed + len(samples))  # the same question again gets another answer
        (sample,) = generate(trained.model, trained.tokenizer, [prompt], turn)
        sys.stdout.write(f"{sample.context}{sample.text}\n")
        samples.append(sample)
    return samples
