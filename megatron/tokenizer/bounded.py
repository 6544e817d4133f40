"""A fast backend whose memory stays bounded, however long the corpus is.

gigatoken remembers every word that it has met, which is what makes it fast, and never forgets one: random text costs it
about 9 bytes per byte. Loading it anew gives the memory back and takes some 20 ms (and the words have to be met again).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron.tokenizer.base import FastBackend

CHECK_CHARACTERS = 16 << 20
MEMORY_LIMIT = 1 << 30
TEXT_LIMIT = 2 << 30
"""Where the system does not tell a process's memory, the backend is loaded anew after so many characters."""


class Bounded:
    """A fast backend that is loaded anew when the process has grown by `limit` bytes since it was loaded.

    load: gives a fresh backend. limit: bytes of growth, looked at every `check` characters of text.
    """

    def __init__(
        self, load: Callable[[], FastBackend], limit: int = MEMORY_LIMIT, check: int = CHECK_CHARACTERS
    ) -> None:
        self.load = load
        self.limit = limit
        self.check = check
        self.unchecked = self.characters = 0
        self.memory: int | None = None
        self._renew()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.inner.vocab_size

    def encode(self, text: str) -> NDArray[Any]:
        """The ids of one document."""
        self.unchecked += len(text)
        if self.unchecked >= self.check:
            self._look()
        return self.inner.encode(text)

    def _look(self) -> None:
        self.characters += self.unchecked
        self.unchecked = 0
        now = process_memory()
        if self.characters >= TEXT_LIMIT if now is None else now - (self.memory or 0) >= self.limit:
            del self.inner
            self._renew()

    def _renew(self) -> None:
        self.inner = self.load()
        self.unchecked = self.characters = 0
        self.memory = process_memory()


def process_memory() -> int | None:
    """The bytes of memory that this process occupies; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
