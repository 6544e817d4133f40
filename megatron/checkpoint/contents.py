"""What lies in a checkpoint beside the tensors: YAML files, the tokenizer, and the versions that wrote it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import yaml

from megatron.checkpoint.storage import Storage
from megatron.config.schema.config import Config

_COMPANIONS = ("special_tokens_map.json", "tokenizer_config.json")  # which tokens end and pad, beside a tokenizer.json
_TOKENIZER_LIMIT = 256 << 20  # bytes; a larger file is not a tokenizer's


def write_yaml(folder: Storage, config: Config, given: Mapping[str, str]) -> None:
    """Write the resolved config to config.yml, and under configs/ the files `given` (name -> text) by the user."""
    sections = config.model_dump(mode="json").values()
    flat = {key: value for section in sections for key, value in section.items() if value is not None}
    text = "# The resolved config of this checkpoint.\n" + yaml.safe_dump(flat, sort_keys=True)
    folder.write("config.yml", text.encode())
    for name, content in given.items():
        folder.write(f"configs/{Path(name).name}", content.encode())


def copy_tokenizer(config: Config, folder: Storage) -> dict[str, str]:
    """Copy the tokenizer's files into the checkpoint; return config key -> path relative to `folder`."""
    copied: dict[str, str] = {}
    for key in ("vocab_file", "merge_file"):
        source = Path(getattr(config.tokenizer, key) or "")
        if source.is_file() and source.stat().st_size <= _TOKENIZER_LIMIT:
            target = Path("tokenizer") / source.name
            if str(target) in copied.values():
                target = target.with_name(f"{key}_{source.name}")
            folder.write(str(target), source.read_bytes())
            copied[key] = str(target)
            for companion in (source.with_name(name) for name in _COMPANIONS):
                if companion.is_file():
                    folder.write(f"tokenizer/{companion.name}", companion.read_bytes())
    return copied


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the values depend on."""
    found = {"python": platform.python_version()}
    for library in ("torch", "deepspeed", "numpy"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
