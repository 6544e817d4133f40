"""A config packed into a word and back."""

from __future__ import annotations

import pytest

from megatron.config.resolve import resolve
from megatron.config.transport import pack, unpack, unpack_files
from megatron.errors import ConfigError
from tests.config.small import SMALL


def test_a_word_holds_the_whole_config() -> None:
    config = resolve(
        {**SMALL, "prompt_end": "\n====\n", "comet_others": {"é": [1, 2.5, None]}, "lr": 3e-4}, world_size=4
    )
    word = pack(config)
    assert unpack(word) == config
    assert word.isascii()
    assert not set(word) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert pack(unpack(word)) == word


def test_the_files_that_were_read_travel_along() -> None:
    config, files = resolve(SMALL), {"a.yml": "# mine\nseed: 7\n"}
    word = pack(config, files)
    assert unpack(word) == config
    assert unpack_files(word) == files
    assert unpack_files(pack(config)) == {}


def test_a_word_is_short_enough_for_a_command_line() -> None:
    assert len(pack(resolve(SMALL))) < 4000


@pytest.mark.parametrize("cut", [0, 1, 7, 100])
def test_a_broken_word(cut: int) -> None:
    with pytest.raises(ConfigError, match="the launcher's payload: it is not a config of this version"):
        unpack(pack(resolve(SMALL))[:cut])


def test_a_word_of_another_version() -> None:
    import base64
    import json
    import zlib

    values = resolve(SMALL).model_dump()
    values["model"]["new_key"] = 1
    word = base64.urlsafe_b64encode(zlib.compress(json.dumps(values).encode())).decode()
    with pytest.raises(ConfigError, match="see that all machines have the same version installed"):
        unpack(word)
