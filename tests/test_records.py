"""Dataclasses as JSON: what was written comes back, and whatever else a file holds is refused in one line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from timm_igkd.errors import InputError, check_range
from timm_igkd.files import read_mapping
from timm_igkd.records import parse_record, read_record, write_record


@dataclass(frozen=True)
class Part:
    size: int
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Whole:
    part: Part
    steps: int | Literal["auto"]
    share: float
    exact: bool
    sides: tuple[int, int]
    versions: Mapping[str, str | None]
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 1)


WHOLE = Whole(Part(3, ("a", "b")), "auto", 0.1, True, (4, 5), {"timm": "1.0", "onnx": None}, (Part(1), Part(2)))
PLAIN: dict[str, Any] = {
    "part": {"size": 3},
    "steps": 4,
    "share": 1,
    "exact": False,
    "sides": [1, 2],
    "versions": {},
}


def test_a_record_comes_back(tmp_path):
    write_record(tmp_path / "whole.json", WHOLE)
    assert read_record(Whole, tmp_path / "whole.json") == WHOLE


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("{}", "lacks 'part'")])
def test_a_file_that_holds_no_record_is_named(content, message, tmp_path):
    (tmp_path / "whole.json").write_text(content)
    with pytest.raises(InputError, match=rf"whole\.json' {message}"):
        read_record(Whole, tmp_path / "whole.json")


def test_keys_are_the_fields_in_their_order(tmp_path):
    write_record(tmp_path / "whole.json", WHOLE)
    assert list(json.loads((tmp_path / "whole.json").read_text())) == list(Whole.__dataclass_fields__)


def test_fields_with_a_default_may_be_absent_and_a_whole_number_is_a_float():
    found = parse_record(Whole, PLAIN, "it")
    assert (found.parts, found.part.names, found.share) == ((), None, 1.0)
    assert isinstance(found.share, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": None}, "it: part must be names with values, found null"),
        ({"part": {}}, "it: part lacks 'size'"),
        ({"part": {"size": "3"}}, "it: part: size must be a whole number of 64 bits, found '3'"),
        ({"part": {"size": True}}, "size must be a whole number of 64 bits, found True"),
        ({"part": {"size": 3.0}}, "size must be a whole number of 64 bits, found 3.0"),
        ({"part": {"size": 1 << 63}}, "size must be a whole number of 64 bits, found a larger one"),
        ({"part": {"size": 3, "names": "ab"}}, "names must be a list of text, found 'ab'"),
        ({"part": {"size": 3, "names": ["a", 1]}}, r"names\[1\] must be text, found 1"),
        ({"steps": "Auto"}, "steps must be a whole number of 64 bits or 'auto', found 'Auto'"),
        ({"steps": None}, "steps must be .* found null"),
        ({"share": float("nan")}, "share must be a finite number, found nan"),
        ({"share": float("inf")}, "share must be a finite number, found inf"),
        ({"share": 10**400}, "share must be a finite number, found a larger one"),
        ({"share": 2.0}, r"it: share must be in \[0, 1\], got 2"),
        ({"exact": 1}, "exact must be true or false, found 1"),
        ({"sides": [1, 2, 3]}, "sides must be a list of 2, found a list of 3"),
        ({"versions": []}, "versions must be names with values, found a list of 0"),
        ({"versions": {"timm": 1}}, "versions.timm must be text, found 1"),
        ({"parts": [{"size": 1}, 7]}, r"parts\[1\] must be names with values, found 7"),
        ({"stps": 4}, r"it has an unknown key 'stps' \(did you mean 'steps'\?\)"),
        ({"part": {"size": "x" * 100}}, r"found 'x{56}\.\.\.$"),
    ],
)
def test_a_value_that_is_not_what_its_field_takes_is_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_record(Whole, PLAIN | change, "it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, [], "text", 3, True])
def test_content_that_is_no_object_is_refused(content):
    with pytest.raises(InputError, match="it must be names with values, found"):
        parse_record(Whole, content, "it")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe{}", b"null", b"[]", b'"text"', b"3", b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 10_000],
)
def test_a_file_that_holds_no_object_is_named_in_one_line(tmp_path, data):
    (tmp_path / "it.json").write_bytes(data)
    with pytest.raises(InputError, match=r"it\.json' (is not JSON|must hold names with values)") as caught:
        read_mapping(tmp_path / "it.json")
    assert "\n" not in str(caught.value)


def test_a_folder_in_a_files_place_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_mapping(tmp_path)
