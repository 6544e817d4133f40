"""Numbers of bytes, for a person."""

from __future__ import annotations


def amount(size: int) -> str:
    """Return a number of bytes in words, such as "12.6 MB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
