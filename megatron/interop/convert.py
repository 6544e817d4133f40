"""Checkpoint -> Hugging Face folder, and back; each ends with both models computing the same tokens.

export_hf("checkpoints/pile", "hf/my-model")
import_hf("pythia-160m", "checkpoints/pythia-160m")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron import logs
from megatron.checkpoint.compatible import stored_config
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.model import WORD_EMBEDDINGS, load_model, stored_tokenizer
from megatron.checkpoint.save import save_checkpoint
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config
from megatron.errors import ExportError, Problem, TokenizerError
from megatron.interop import verify
from megatron.interop.build import family_to_export, family_to_import
from megatron.interop.card import model_card, write_card
from megatron.interop.family import Family
from megatron.interop.hf_files import HfWeights, read_config, write_json, write_weights
from megatron.interop.new_folder import new_folder
from megatron.interop.rules import Rule
from megatron.interop.tokenizer_files import write_tokenizer
from megatron.interop.verify import Agreement
from megatron.model.accounting import padded_vocab_size
from megatron.parallel.mesh import Mesh
from megatron.parallel.sharding import StatePiece
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

logger = logs.get_logger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HF_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_NO_PROGRESS = {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0, "skipped_iterations": 0}


def export_hf(
    checkpoint: Path | str,
    out: Path | str,
    iteration: int | None = None,
    precision: str | None = None,
    overwrite: bool = False,
) -> list[Agreement]:
    """Write a checkpoint as a Hugging Face folder, load it with transformers, and compare the logits.

    checkpoint: the save folder of a run, or one `global_step<N>`. out: a folder that does not exist yet.
    precision: "fp32", "fp16" or "bf16" of the written weights, from the fp32 masters where there are any; None keeps
        the stored one.
    overwrite: replace an earlier export at `out`, once the new one is proved.
    Returns the agreement in fp32 and in the written precision, as in the card. Raises ExportError, and leaves `out` as
    it was, where Hugging Face has no counterpart or the logits differ beyond the tolerance.
    """
    reader = CheckpointReader(find_checkpoint(checkpoint, iteration))
    config = stored_config(reader)
    family = family_to_export(config)
    precision = precision or _stored_precision(reader)
    read = _reader_in(reader, precision)
    tokenizer = _tokenizer_of(reader)
    rows = reader.shapes[WORD_EMBEDDINGS][0]
    logger.info("exporting %s as %s in %s", reader.folder, family.architecture, precision)
    with new_folder(Path(out), overwrite) as folder:
        weights = _to_hf(family.rules(config.model), read, _DTYPES[precision])
        size = write_weights(folder, weights)
        logger.info("wrote %.1f MB of weights", size / 1e6)
        _write_config(folder, family, config, rows, precision, tokenizer)
        with_tokenizer = tokenizer is not None and write_tokenizer(tokenizer, folder, config.model.seq_length)
        batches = verify.fixed_batches(tokenizer.vocab_size if tokenizer else rows, config.model.seq_length, tokenizer)
        agreements = []
        for kind in dict.fromkeys(("fp32", precision)):
            ours = verify.our_logits(load_model(reader, precision=kind, read=read), batches)
            agreement = verify.compare(kind, batches, ours, verify.hf_logits(folder, kind, batches))
            logger.info("%s", agreement)
            agreements.append(agreement)
        verify.require_agreement(agreements[0], f"export of {reader.folder}")
        name = Path(out).name
        write_card(folder, model_card(reader, config, family, rows, agreements, name, with_tokenizer))
    logger.info("exported to %s", out)
    return agreements


def _stored_precision(reader: CheckpointReader) -> str:
    dtype = reader.dtype(WORD_EMBEDDINGS)
    return next(name for name, known in _DTYPES.items() if known is dtype)


def _reader_in(reader: CheckpointReader, precision: str) -> Callable[[str], Tensor]:
    """Return a function that reads a weight in a precision, from its fp32 master where that is more exact."""

    def read(name: str) -> Tensor:
        master = None if reader.dtype(name) is _DTYPES[precision] else reader.read(name, "master")
        values = reader.read(name) if master is None else master
        assert values is not None, f"the model of this config has {name}"
        return values.to(_DTYPES[precision])

    return read


def _tokenizer_of(reader: CheckpointReader) -> Tokenizer | None:
    """Return the checkpoint's tokenizer; None, with a warning, where its files are gone."""
    try:
        return build_tokenizer(stored_tokenizer(reader))
    except TokenizerError as error:
        logger.warning("the export has no tokenizer: %s", error)
        return None


def _to_hf(rules: list[Rule], read: Callable[[str], Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the Hugging Face file, one rule at a time."""
    for rule in rules:
        for name, tensor in zip(rule.theirs, rule.to_hf([read(ours) for ours in rule.ours]), strict=True):
            yield name, tensor.to(dtype)


def _write_config(
    folder: Path, family: Family, config: Config, rows: int, precision: str, tokenizer: Tokenizer | None
) -> None:
    end = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eod if tokenizer else None)
    dtype = _HF_NAMES[precision]
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.to_hf(config, rows),
        **end,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **end})


def import_hf(model: Path | str, out: Path | str) -> list[Agreement]:
    """Write a Hugging Face folder as a checkpoint of step 0, and compare the logits of both.

    out: a folder that does not exist yet; it becomes a `load` folder, with the model's keys in `model.yml`.
    Returns the agreement in fp32. Raises ExportError, and leaves nothing at `out`, where our model cannot express
    what config.json says, a weight is missing or left over, or the logits differ beyond the tolerance.
    """
    source = Path(model)
    hf_config = read_config(source)
    family = family_to_import(hf_config.get("model_type"))
    weights = HfWeights(source)
    flat = {**family.from_hf(hf_config), "precision": _precision_of(weights), **_tokenizer_keys(source)}
    flat.update(_vocabulary_keys(flat, hf_config["vocab_size"]))
    config = resolve(flat)
    logger.info("importing %s (%s) in %s", source, family.architecture, config.numerics.precision)
    with new_folder(Path(out)) as folder:
        pieces = list(_from_hf(family, config, weights))
        extra = {"imported_from": str(source), "tokenizer": _tokenizer_record(config)}
        saved = save_checkpoint(folder, 0, pieces, _NO_PROGRESS, config, extra, Mesh.single())
        del pieces
        reader = CheckpointReader(saved)
        tokenizer = _tokenizer_of(reader) if config.tokenizer.vocab_file else None
        rows = tokenizer.vocab_size if tokenizer else hf_config["vocab_size"]
        batches = verify.fixed_batches(rows, config.model.seq_length, tokenizer)
        ours = verify.our_logits(load_model(reader, precision="fp32"), batches)
        agreement = verify.compare("fp32", batches, ours, verify.hf_logits(source, "fp32", batches))
        logger.info("%s", agreement)
        verify.require_agreement(agreement, f"import of {source}")
        _write_model_yaml(folder, flat, saved.name, Path(out))
    logger.info("imported to %s; its keys are in %s", out, Path(out) / "model.yml")
    return [agreement]


def _from_hf(family: Family, config: Config, weights: HfWeights) -> Iterator[StatePiece]:
    """Yield our weights, one rule at a time. Raises ExportError for tensors that are missing or left over."""
    rules = family.rules(config.model)
    names = _match(family, [name for rule in rules for name in rule.theirs], weights)
    dtype = _DTYPES[config.numerics.weight_precision]
    for rule in rules:
        for name, tensor in zip(rule.ours, rule.from_hf([weights.read(names[n]) for n in rule.theirs]), strict=True):
            flat = tensor.to(dtype).contiguous().reshape(-1)
            yield StatePiece(name, "weight", tuple(tensor.shape), 0, flat)


def _match(family: Family, wanted: list[str], weights: HfWeights) -> dict[str, str]:
    """Return for each wanted tensor its name in the files, where older files use other names."""
    ignored = re.compile("|".join(family.ignored) or r"(?!)")
    found: dict[str, str] = {}
    left: list[str] = []
    for name in weights.names():
        spellings = (name, family.aliases.get(name, name), f"{family.prefix}{name}")
        known = next((spelling for spelling in spellings if spelling in wanted), None)
        if known:
            found[known] = name
        elif not any(ignored.fullmatch(spelling) or spelling in family.heads for spelling in spellings):
            left.append(name)
    missing = sorted(set(wanted) - set(found))
    if left or missing:
        why = (
            f"It lacks {missing[:4] or 'nothing'} and has {left[:4] or 'nothing'} that the architecture does not know."
        )
        raise ExportError(Problem(str(weights.folder), why, "Take a complete model of this architecture."))
    return found


def _precision_of(weights: HfWeights) -> str:
    """Return the precision of the matrices in a folder."""
    name = next(name for name in weights.names() if name.endswith(".weight"))
    dtype = weights.read(name).dtype
    return next((ours for ours, known in _DTYPES.items() if known is dtype), "fp32")


def _tokenizer_keys(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    return {"tokenizer_type": "HFTokenizer", "vocab_file": str(path)} if path.is_file() else {}


def _tokenizer_record(config: Config) -> dict[str, Any]:
    if not config.tokenizer.vocab_file:
        return {}
    tokenizer = build_tokenizer(config.tokenizer)
    return {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def _vocabulary_keys(flat: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the divisor that pads the tokenizer's ids to exactly the model's rows."""
    if "vocab_file" not in flat:
        return {}
    tokens = build_tokenizer(resolve(flat).tokenizer).vocab_size
    divisors = [128, 64, 32, 16, 8, 4, 2, 1, 256, 512, rows]
    return {
        "make_vocab_size_divisible_by": next((d for d in divisors if padded_vocab_size(tokens, d, 1) == rows), rows)
    }


def _write_model_yaml(folder: Path, flat: dict[str, Any], step: str, final: Path) -> None:
    """Write the keys of the imported model as a config file that can be given to train.py or generate.py."""
    keys = dict(flat)
    if "vocab_file" in keys:
        keys["vocab_file"] = str(final / step / "tokenizer" / Path(keys["vocab_file"]).name)
    text = yaml.safe_dump({**keys, "load": str(final), "finetune": True}, sort_keys=False)
    (folder / "model.yml").write_text(f"# Imported weights; merge with your own data and optimizer.\n{text}", "utf-8")
