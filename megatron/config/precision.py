"""One precision from the `precision` key and DeepSpeed's fp16 and bf16 blocks, as GPT-NeoX reads them."""

from __future__ import annotations

from typing import Any

from megatron.config.draft import Draft


def derive_precision(draft: Draft) -> None:
    """Set `precision` in the draft, and `enabled` in the blocks that are given; note what contradicts it.

    A block that is enabled decides where `precision` is unset; `fp16: {type: bfloat16}` means bf16, and so does fp8 to
    the blocks, which know of the weights only.
    """
    claims = _claims(draft)
    if not draft.given("precision") and claims:
        draft.values["precision"] = claims[0][0]
    precision = draft.values.get("precision", "fp32")
    if precision not in ("fp32", "fp16", "bf16", "fp8"):
        return
    of_weights = "bf16" if precision == "fp8" else precision
    decisive = "precision" if draft.given("precision") else next((key for _, key, _ in claims), "")
    place = f" ({draft.where(decisive)})" if draft.where(decisive) else ""
    for claimed, key, value in claims:
        if claimed != of_weights:
            why = f"it asks for {claimed}, but {decisive} for {precision}{place}."
            draft.refuse(key, value, why, f"Keep one of the two: precision: {claimed}, or precision: {precision}")
    for name in ("fp16", "bf16"):
        block = draft.values.get(name)
        if isinstance(block, dict) and block.get("enabled") is False and of_weights == name:
            draft.refuse(f"{name}.enabled", False, f"precision is {precision}.", f"Remove {name}.enabled.")
        elif isinstance(block, dict):
            kept = {key: value for key, value in block.items() if key not in ("fp16", "type")}
            draft.values[name] = {**kept, "enabled": of_weights == name}


def _claims(draft: Draft) -> list[tuple[str, str, Any]]:
    """Return (precision, key, value) of each block that is switched on."""
    claims: list[tuple[str, str, Any]] = []
    fp16, bf16 = draft.values.get("fp16"), draft.values.get("bf16")
    if isinstance(fp16, dict):
        key = "fp16.enabled" if "enabled" in fp16 else "fp16.fp16"
        if fp16.get("enabled", fp16.get("fp16")):
            claims.append(("bf16" if fp16.get("type") == "bfloat16" else "fp16", key, True))
    if isinstance(bf16, dict) and bf16.get("enabled"):
        claims.append(("bf16", "bf16.enabled", True))
    return claims
