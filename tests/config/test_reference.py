"""The generated pages are current, and the editor's schema accepts every shipped file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron.config import keys, reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["docs/configuration.md", "docs/config.schema.json", "docs/parallelism.md"])
def test_pages_are_current(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == reference.pages()[name], "run: python -m megatron.config.reference"


def test_every_key_has_its_row() -> None:
    text = reference.markdown()
    for key in keys.fields():
        assert f"| `{key}`" in text


def test_the_schema_knows_every_key_in_both_spellings() -> None:
    properties = json.loads(json.dumps(reference.json_schema()))["properties"]
    assert properties["num_layers"]["minimum"] == 1
    assert properties["num-layers"] == {"$ref": "#/properties/num_layers"}
    for file in sorted((ROOT / "configs").rglob("*.yml")):
        assert set(yaml.safe_load(file.read_text())) <= set(properties), file
