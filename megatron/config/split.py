"""`split`: how the documents of one data set are shared among training, validation and test."""

from __future__ import annotations


def split_shares(split: str) -> tuple[float, float, float]:
    """Return the shares of train, valid and test from `969, 30, 1`, `90/5/5` or `100`; they need not sum to 1.

    Raises ValueError, with the reason, for anything but one to three numbers of which none is negative and the first
    is positive.
    """
    try:
        shares = [float(part) for part in split.split("," if "," in split else "/")]
    except ValueError:
        raise ValueError("it is not a list of numbers divided by comma or slash") from None
    if len(shares) > 3:
        raise ValueError(f"it has {len(shares)} shares; there are three: training, validation, test")
    if not all(0 <= share < float("inf") for share in shares):
        raise ValueError("a share cannot be negative or infinite")
    if shares[0] == 0:
        raise ValueError("its first share is 0, which leaves nothing to train on")
    train, valid, test = [*shares, 0.0, 0.0][:3]
    return train, valid, test
