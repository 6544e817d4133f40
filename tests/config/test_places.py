"""The places of keys, found again in the files' texts."""

from __future__ import annotations

from megatron.config.places import locate_error, located
from megatron.config.yaml_reader import Setting
from megatron.errors import DataError, LaunchError, Problem


def test_only_a_key_that_is_set_has_a_place() -> None:
    settings = {"data_path": Setting("x", "a.yml:3")}
    found = located(
        [Problem("data_path = x", "w", "f"), Problem("split", "w", "f"), Problem("x y", "w", "f")], settings
    )
    assert [problem.where for problem in found] == ["a.yml:3", "", ""]


def test_a_known_place_stays() -> None:
    settings = {"data_path": Setting("x", "a.yml:3")}
    assert located([Problem("data_path", "w", "f", "b.yml:1")], settings)[0].where == "b.yml:1"


def test_the_error_keeps_its_kind_and_its_code() -> None:
    error = LaunchError(Problem("hostfile = h", "w", "f"))
    error.exit_code = 7
    found = locate_error(error, {"a.yml": "\nhostfile: h\n"}, {"hostfile": "h"})
    assert (type(found), found.exit_code, str(found)) == (LaunchError, 7, "a.yml:2: hostfile = h: w f")


def test_a_value_that_the_command_line_replaced_has_no_line_in_a_file() -> None:
    error = DataError(Problem("data_path = new", "w", "f"))
    assert locate_error(error, {"a.yml": "data_path: old\n"}, {"data_path": "new"}) is error
