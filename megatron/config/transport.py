"""A Config as one word of ASCII, for a worker's command line or environment.

Secrets cannot be inside: keys that name one are refused when a config is read, because keys (of Weights & Biases,
of Comet) come from the environment only.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib

from pydantic import ValidationError

from megatron.config.schema.config import Config
from megatron.errors import ConfigError, Problem


def pack(config: Config) -> str:
    """Return the config as urlsafe base64 of compressed JSON; equal configs give equal words."""
    text = json.dumps(config.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")


def unpack(word: str) -> Config:
    """Return the config that `pack` made the word of; every rule held then, so only types are checked again.

    Raises ConfigError for a word that is cut off or of another version."""
    try:
        data = zlib.decompress(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
        return Config.model_validate(json.loads(data))
    except (binascii.Error, zlib.error, ValueError, ValidationError) as error:
        raise ConfigError(
            Problem(
                "the launcher's payload",
                f"it is not a config of this version: {str(error).splitlines()[0]}.",
                "Start the run again with ./deepy.py, and see that all machines have the same version installed.",
            )
        ) from error
