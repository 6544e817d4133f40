"""YAML as located values: numbers, duplicates, missing files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.yaml_reader import find_file, parse_scalar, parse_value, read_files, read_text
from megatron.errors import Problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e8", 5e8),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("6.", 6.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("-3", -3),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("e8", "e8"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("-.inf", float("-inf")),
    ],
)
def test_scalars(text: str, value: object) -> None:
    result = parse_scalar(text)
    assert result == value
    assert type(result) is type(value)


def test_every_value_knows_its_line() -> None:
    settings, problems = read_text("# first\na-b: 1\nc:\n  d: {e: 2,\n      f: 3}\n", "x.yml")
    assert not problems
    assert settings["a_b"].where == "x.yml:2"
    assert settings["c"].value == {"d": {"e": 2, "f": 3}}
    assert settings["c"].inner == {"d": "x.yml:4", "d.e": "x.yml:4", "d.f": "x.yml:5"}


def test_quotes_keep_a_string() -> None:
    settings, _ = read_text("a: '1e-4'\nb: \"yes\"\n", "x.yml")
    assert settings["a"].value == "1e-4"
    assert settings["b"].value == "yes"


def test_json_with_tabs_and_dashes() -> None:
    settings, problems = read_text('{\n\t"num-layers": 2,\n\t"optimizer": {"params": {"lr": 1e-4}}\n}', "x.json")
    assert not problems
    assert settings["num_layers"].where == "x.json:2"
    assert settings["optimizer"].value == {"params": {"lr": 1e-4}}


def test_merge_keys_and_anchors() -> None:
    settings, problems = read_text("x: &base {lr: 1, c: 2}\ny:\n  <<: *base\n  c: 5\n", "x.yml")
    assert not problems
    assert settings["y"].value == {"lr": 1, "c": 5}


@pytest.mark.parametrize("second", ["num_layers", "num-layers", '"num-layers"'])
def test_duplicate_in_one_file_names_both_lines(second: str) -> None:
    _, problems = read_text(f"num_layers: 1\nother: 2\n{second}: 1\n", "a.yml")
    assert len(problems) == 1
    assert problems[0].where == "a.yml:3"
    assert "it is already set at a.yml:1." in str(problems[0])


def test_duplicate_inside_a_block() -> None:
    _, problems = read_text("optimizer:\n  type: adam\n  type: sgd\n", "a.yml")
    assert str(problems[0]).startswith("a.yml:3: type: it is already set at a.yml:2.")


def test_duplicate_across_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yml", tmp_path / "b.yml"
    first.write_text("x: 1\nnum_layers: 1\n")
    second.write_text("num-layers: 1\n")
    settings, problems = read_files([first, second])
    assert settings["num_layers"].where == f"{first}:2"
    assert str(problems[0]).startswith(f"{second}:1: num_layers: it is already set at {first}:2.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,\nb: 2", "x.yml:3: not YAML"),
        ("- a\n", "x.yml:1: no keys: the file is not a mapping."),
        ("a: !!python/name:os.system x\n", "tags have no meaning here."),
        ("a: &a [*a]\n", "it is nested without end."),
        ("a: b: c\n", "x.yml:1: not YAML"),
    ],
)
def test_what_is_no_configuration(text: str, said: str) -> None:
    _, problems = read_text(text, "x.yml")
    assert len(problems) == 1
    assert said in str(problems[0])


def test_an_empty_file_has_no_keys() -> None:
    assert read_text("# nothing\n", "x.yml") == ({}, [])


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_bytes(b"\xff\xfe\x00")
    _, problems = read_files([file])
    assert "it cannot be read" in str(problems[0])


def test_suffix_and_folder_are_optional(tmp_path: Path) -> None:
    (tmp_path / "125M.yml").write_text("")
    (tmp_path / "b.json").write_text("{}")
    assert find_file("125M", tmp_path) == tmp_path / "125M.yml"
    assert find_file("125M.yml", tmp_path) == tmp_path / "125M.yml"
    assert find_file("b.json", tmp_path) == tmp_path / "b.json"
    assert find_file(str(tmp_path / "125M")) == tmp_path / "125M.yml"


def test_a_missing_file_lists_near_names(tmp_path: Path) -> None:
    for name in ("125M.yml", "1-3B.yml", "local_setup.yml"):
        (tmp_path / name).write_text("")
    problem = find_file("126M", tmp_path)
    assert isinstance(problem, Problem)
    assert f"no such file: {tmp_path}/126M.yml" in str(problem)
    assert f"In {tmp_path} there are: 125M.yml" in str(problem)


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    problem = find_file("125M", tmp_path / "nowhere")
    assert "does not exist; give another with -d DIR." in str(problem)


def test_values_of_the_command_line() -> None:
    assert parse_value("3e-4", "--set").value == 3e-4
    assert parse_value("[1, 2]", "--set").value == [1, 2]
    assert parse_value("{a: 1}", "--set").value == {"a": 1}
    assert parse_value("a: b: c", "--set").value == "a: b: c"
    assert parse_value("", "--set").value is None


@pytest.mark.parametrize("text", ["a:\n\tb: 1\n", "a: 1\n\tb: 2\n"])
def test_a_tab_is_named(text: str) -> None:
    _, problems = read_text(text, "x.yml")
    assert problems[0].where == "x.yml:2"
    assert "and the line has a tab. Indent with spaces; YAML has no tabs." in str(problems[0])
    assert "tab" not in str(read_text("a: b: c\n", "x.yml")[1][0])
