"""A Hugging Face model folder: reading tensors one by one, and writing them in shards. No pickled file is opened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.tensor_file import write_tensor_file
from megatron.errors import ExportError, Problem

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
SHARD_BYTES = 4 << 30


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder. Raises ExportError where it is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Name a folder with config.json and model.safetensors, as transformers' save_pretrained writes it."
        raise ExportError(
            Problem(str(folder), f"It is not a Hugging Face model: {path.name}: {error}.", fix)
        ) from error
    if not isinstance(config, dict):
        raise ExportError(Problem(str(path), "It is not a JSON object.", "Restore it from the model's source."))
    return config


class HfWeights:
    """The tensors of a model folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._locate()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its stored dtype. Raises ExportError where its file is damaged."""
        path = self.folder / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def _locate(self) -> dict[str, str]:
        """Return tensor name -> file name."""
        index = self.folder / _INDEX
        if index.is_file():
            located: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return located
        path = self.folder / _SINGLE
        if not path.is_file():
            raise self._without_safetensors()
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def _without_safetensors(self) -> ExportError:
        pickled = any(self.folder.glob("*.bin"))
        why = "Its weights are pickled .bin files, which are never opened here." if pickled else f"It has no {_SINGLE}."
        fix = (
            "Convert it once with transformers: "
            f"AutoModelForCausalLM.from_pretrained('{self.folder}').save_pretrained('{self.folder}-safetensors')"
            if pickled
            else "Download the whole model."
        )
        return ExportError(Problem(str(self.folder), why, fix))


def _unreadable(path: Path, error: Exception) -> ExportError:
    return ExportError(Problem(str(path), f"It cannot be read ({error}).", "Download or copy the file again."))


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write tensors to model.safetensors, or to numbered shards with an index; return the bytes of all tensors.

    At most one shard (4 GiB) is in memory.
    """
    shards: list[list[str]] = []
    held: list[tuple[str, Tensor]] = []
    total = size = 0
    for name, tensor in tensors:
        values = tensor.contiguous()
        if held and size + values.nbytes > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), held))
            held, size = [], 0
        held.append((name, values))
        size += values.nbytes
        total += values.nbytes
    shards.append(_write_shard(folder, len(shards), held))
    _name_shards(folder, shards, total)
    return total


def _write_shard(folder: Path, number: int, tensors: list[tuple[str, Tensor]]) -> list[str]:
    write_tensor_file(folder / f"shard{number}", tensors)
    return [name for name, _ in tensors]


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards the names that transformers expects, now that their number is known."""
    if len(shards) == 1:
        (folder / "shard0").rename(folder / _SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people and programs."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
