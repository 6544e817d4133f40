"""Which tokens of one context-parallel rank see which of another's; plain integers, without torch.

On a context axis of C ranks a sequence is cut into 2C equal chunks, and rank r holds the chunks r and 2C-1-r, the first
half of its tokens and the second.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Queries of one rank and keys of one rank, as slices of their tokens, some pairs of which are visible.

    causal: some pairs have the key after the query. cut: some are further apart than the window.
    """

    query: slice
    key: slice
    causal: bool
    cut: bool


def visible_parts(query_rank: int, key_rank: int, size: int, half: int, window: int | None = None) -> list[Part]:
    """Return the parts that together hold every visible pair of two ranks' tokens once.

    half: tokens of a chunk; a rank has two. window: a token sees itself and the `window` tokens before it, or all.
    """
    first, second, both = slice(0, half), slice(half, 2 * half), slice(0, 2 * half)
    if window is None:
        if query_rank == key_rank:
            return [Part(both, both, causal=True, cut=False)]
        after = query_rank > key_rank
        return [Part(both, first, False, False) if after else Part(second, both, False, False)]
    parts = []
    for query, query_chunk in ((first, query_rank), (second, 2 * size - 1 - query_rank)):
        for key, key_chunk in ((first, key_rank), (second, 2 * size - 1 - key_rank)):
            nearest = (query_chunk - key_chunk) * half - (half - 1)
            furthest = (query_chunk - key_chunk) * half + (half - 1)
            if furthest >= 0 and nearest <= window:
                parts.append(Part(query, key, causal=nearest < 0, cut=furthest > window))
    return parts


def seen_keys(query_rank: int, key_rank: int, size: int, half: int, window: int | None = None) -> slice:
    """Return the tokens of `key_rank` that some token of `query_rank` sees; an empty slice where there are none."""
    keys = [part.key for part in visible_parts(query_rank, key_rank, size, half, window)]
    if not keys:
        return slice(0, 0)
    return slice(min([key.start for key in keys]), max([key.stop for key in keys]))


def tokens_sent(rank: int, size: int, half: int, window: int | None = None) -> tuple[int, int]:
    """Return (tokens whose keys and values a rank sends, tokens whose gradients it sends) in one pass of the ring.

    Without a window both go all the way round. Under one, keys go straight to the ranks that see them, and gradients
    straight back.
    """
    others = [other for other in range(size) if other != rank]
    if window is None:
        return 2 * half * len(others), 2 * half * len(others)
    ours = [seen_keys(other, rank, size, half, window) for other in others]
    theirs = [seen_keys(rank, other, size, half, window) for other in others]
    return sum(keys.stop - keys.start for keys in ours), sum(keys.stop - keys.start for keys in theirs)
