"""Every name of GPT-NeoX is classified, and every key of ours is described."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import keys
from megatron.config.blocks import BLOCKS, OPTIMIZERS
from megatron.config.neox_keys import ALIASES, IGNORED, IMPLIED, OWN_KEYS, REFUSED, RENAMED
from megatron.config.reference import bounds, unit
from tests.config.small import SMALL, problems

NEOX_KEYS = (Path(__file__).parent / "neox_keys.txt").read_text().split()


def test_all_321_names_of_gpt_neox_are_classified() -> None:
    assert len(NEOX_KEYS) == len(set(NEOX_KEYS)) == 321
    assert [key for key in NEOX_KEYS if keys.status(key) == "unknown"] == []


def test_each_key_has_one_meaning() -> None:
    tables = [set(keys.fields()) | {keys.PLANNING}, set(ALIASES), set(IMPLIED), set(IGNORED), set(REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set().union(*tables) - set(NEOX_KEYS) == OWN_KEYS
    assert not set(RENAMED) & set().union(*tables)


def test_names_that_tables_point_to_exist() -> None:
    for target in [*ALIASES.values(), *RENAMED.values()]:
        top, _, entry = target.partition(".")
        assert top in keys.fields(), target
        if entry and top != "optimizer":
            assert entry in BLOCKS[top].model_fields, target
    for targets in IMPLIED.values():
        assert set(targets) <= set(keys.fields())
    assert set(BLOCKS) <= set(keys.fields())


@pytest.mark.parametrize("key", list(keys.fields()))
def test_every_key_is_described(key: str) -> None:
    _, info = keys.fields()[key]
    assert info.description
    assert info.description.endswith(".")
    annotation = str(info.annotation)
    is_number = info.annotation in (int, float) or annotation in ("int | None", "float | None")
    assert bool(unit(info)) == is_number or annotation.startswith("list[int]"), "a number says what it counts"
    assert bool(bounds(info)) == is_number, "a number has a range"


def test_sections_stay_small_and_flat_names_unique() -> None:
    sizes = {name: len(section.model_fields) for name, section in keys.sections().items()}
    assert max(sizes.values()) <= 30
    assert sum(sizes.values()) == len(keys.fields())


def test_every_section_and_reason_is_written() -> None:
    assert all(section.__doc__ for section in keys.sections().values())
    assert all(reason and not reason.endswith(".") for reason in IGNORED.values())
    assert all(refusal.reason.endswith(".") and refusal.fix for refusal in REFUSED.values())


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refused_key_takes_only_what_asks_for_nothing(key: str) -> None:
    from megatron.config.resolve import resolve

    neutral = REFUSED[key].neutral
    resolve({**SMALL, key: neutral})
    resolve({**SMALL, key: None})
    other = not neutral if isinstance(neutral, bool) else "something"
    said = problems(**{key: other})
    assert said.startswith(f"{key} = ")
    assert REFUSED[key].reason in said


@pytest.mark.parametrize("value", [{}, {"enabled": False}, {"enabled": False, "other": 3}])
def test_a_block_that_is_switched_off_is_accepted(value: dict[str, object]) -> None:
    from megatron.config.resolve import resolve

    resolve({**SMALL, "amp": value, "curriculum_learning": value, "autotuning": value})


def test_optimizers_are_those_that_are_built() -> None:
    """The configuration knows the optimizers' parameters without torch; here the two lists meet."""
    from megatron.optim.build import KINDS

    from_deepspeed = {"cpu_adam"}
    assert set(KINDS) | from_deepspeed == set(OPTIMIZERS)
