"""A Config as one word of ASCII, for a worker's command line or environment.

Secrets cannot be inside: keys that name one are refused when a config is read, because keys (of Weights & Biases,
of Comet) come from the environment only.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem

_FILES = "config_files"


def pack(config: Config, config_files: Mapping[str, str] | None = None) -> str:
    """Return the config as urlsafe base64 of compressed JSON; equal configs give equal words.

    config_files: name -> text of the files it was read from, which travel along for checkpoints to keep.
    """
    body = {**config.model_dump(), **({_FILES: dict(config_files)} if config_files else {})}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")


def unpack(word: str) -> Config:
    """Return the config that `pack` made the word of; every rule held then, so only types are checked again.

    Raises ConfigError for a word that is cut off or of another version."""
    try:
        body = _body(word)
        return Config.model_validate({key: value for key, value in body.items() if key != _FILES})
    except (binascii.Error, zlib.error, ValueError, ValidationError) as error:
        raise ConfigError(
            Problem(
                "the launcher's payload",
                f"it is not a config of this version: {str(error).splitlines()[0]}.",
                "Start the run again with ./deepy.py, and see that all machines have the same version installed.",
            )
        ) from error


def unpack_files(word: str) -> dict[str, str]:
    """Return name -> text of the files that travelled with a word that `unpack` understands."""
    files: dict[str, str] = _body(word).get(_FILES, {})
    return files


def _body(word: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(zlib.decompress(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))
    return body
