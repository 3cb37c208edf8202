"""What a store says of itself: read once, checked once, refused in one line."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import ImageList, noise_image, ramp, tiny_manifest, tiny_teacher, write_store

from timm_igkd.attribution.options import IGOptions
from timm_igkd.cli.main import build_parser
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.manifest import read_manifest
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import first_difference

IMAGES = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "maps"
    return write_store(folder, IMAGES, [ramp(index) for index in range(4)], shard_size=2).path


@pytest.fixture
def store(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "maps"))


def change(path: Path, **values: Any) -> None:
    """Change values of a JSON file; of nested ones by "part.name"."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(content))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": "4"}, "n must be a whole number of 64 bits, found '4'"),
    ({"n": 4.0}, "n must be a whole number"),
    ({"n": None}, "n must be a whole number of 64 bits, found null"),
    ({"n": 0}, r"n must be in \[1, 4\], got 0"),
    ({"n": -4}, "n must be in"),
    ({"n": 5}, r"n must be in \[1, 4\], got 5"),
    ({"n": 10**12}, r"n must be in \[1, 4\]"),
    ({"n": 10**30}, "n must be a whole number of 64 bits, found a larger one"),
    ({"shard_rows": 0}, "shard_rows must be at least 1"),
    ({"shard_rows": "2"}, "shard_rows must be a whole number"),
    ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ({"batch_images": -1}, "batch_images must be at least 1"),
    ({"map_size": 0}, "map_size must be at least 1"),
    ({"dataset": []}, "dataset must be names with values, found a list of 0"),
    ({"dataset__split": None}, "dataset: split must be text, found null"),
    ({"dataset__class_names": [1, 2]}, r"class_names\[0\] must be text, found 1"),
    ({"teacher__mean": ["a"]}, r"teacher: mean\[0\] must be a finite number"),
    ({"teacher__class_indices": [-1]}, r"teacher: class_indices must be in .* got -1"),
    ({"teacher__class_indices": [0, 2]}, r"class_indices must be in \[0, 1\], got 2"),
    ({"teacher__num_classes": 0}, "teacher: num_classes must be at least 1"),
    ({"options__n_steps": "many"}, "n_steps must be a whole number of 64 bits or 'auto', found 'many'"),
    ({"options__n_steps": 0}, "options: n_steps must be at least 1, got 0"),
    ({"options__baseline": "white"}, "baseline must be 'mean' or 'black'"),
    ({"options__tolerance": float("nan")}, "tolerance must be a finite number, found nan"),
    ({"options__methods": "ig"}, "options has an unknown key 'methods'"),
    ({"engine": "slow"}, "engine must be 'captum' or 'fast', found 'slow'"),
    ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16', found 'float16'"),
    ({"logits": "yes"}, "logits must be true or false, found 'yes'"),
    ({"format": 99}, "is of format '99', expected"),
    ({"format": None}, "is of format 'None', expected"),
]


@pytest.mark.parametrize("name", ["manifest.json", "provenance.json"])
@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_value_is_refused_in_one_line_with_its_name(store, name, values, message):
    change(store / name, **values)
    with pytest.raises(InputError, match=message) as caught:
        MapStore(store)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert "timm-igkd maps" in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "provenance.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"null", b"[]", b"{}", b"[" * 50_000, b'{"format": 1}'])
def test_file_that_holds_no_record_is_refused_in_one_line(store, name, data):
    (store / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}'") as caught:
        MapStore(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["n", "dataset", "teacher", "options", "shard_rows", "versions"])
def test_missing_key_is_named(store, missing):
    content = json.loads((store / "manifest.json").read_text())
    del content[missing]
    (store / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"manifest.json' lacks '{missing}'"):
        MapStore(store)


@pytest.mark.parametrize("rows", [1, 2])
def test_store_that_promises_a_billion_shards_is_refused_at_once(store, rows):
    for name in ("manifest.json", "provenance.json"):
        change(store / name, n=10**12, dataset__num_images=10**12, shard_rows=rows)
    with pytest.raises(InputError, match=rf"is not complete \(0 of {10**12 // rows} shards\)"):
        MapStore(store)


def test_provenance_of_another_manifest_is_refused(store):
    change(store / "provenance.json", dataset__split="validation")
    with pytest.raises(InputError, match=r"dataset\.split is 'validation' there, 'train' here"):
        MapStore(store)


def test_damaged_manifest_is_refused_by_a_build_too(store):
    change(store / "manifest.json", n="4")
    with pytest.raises(InputError, match="n must be a whole number"):
        compute_maps(tiny_teacher(), IMAGES, store, progress=False)


def as_format_1(store: Path, **values: Any) -> None:
    for name in ("manifest.json", "provenance.json"):
        change(store / name, format=1, **values)


def test_store_of_format_1_is_refused_with_the_command_that_rebuilds_it(store):
    options = {"n_steps": "auto", "reduction": "sum", "baseline": "mean"}
    as_format_1(store, options=options, logits=True, map_size=8, n=3, teacher__name="a b", dataset__name="it's\nhere")
    command = (
        "timm-igkd maps --teacher 'a b' --dataset 'it'\"'\"'s here' --split train --n-steps auto --reduction sum "
        "--map-size 8 --limit 3 --logits --out NEW_FOLDER"
    )
    for use in (MapStore, lambda folder: compute_maps(tiny_teacher(), IMAGES, folder, progress=False)):
        with pytest.raises(InputError, match="is of format 1, whose rows have no hash of their own") as caught:
            use(store)
        assert str(caught.value).endswith(f"build it again with: {command}")


@pytest.mark.parametrize(
    "damage", [{"teacher": None}, {"options": [], "dataset": 3}, {"n": {}}, {"engine": ["captum"]}]
)
def test_damaged_store_of_format_1_is_refused_the_same(store, damage):
    as_format_1(store, **damage)
    with pytest.raises(InputError, match=r"is of format 1, .* build it again with: timm-igkd maps") as caught:
        MapStore(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("steps", "tolerance"), [("auto", 0.5), (7, None)])
def test_rebuilding_command_is_one_that_the_command_line_takes(store, steps, tolerance):
    as_format_1(store, options={"n_steps": steps, "tolerance": 0.5}, engine="captum", n=2)
    with pytest.raises(InputError) as caught:
        MapStore(store)
    words = shlex.split(str(caught.value).partition("build it again with: ")[2])
    args = build_parser().parse_args(words[1:])
    found = args.teacher, args.n_steps, args.tolerance, args.engine, args.limit
    assert found == ("none", steps, tolerance, "captum", 2)


def test_options_of_an_older_version_take_their_defaults(store):
    for name in ("manifest.json", "provenance.json"):
        change(store / name, options={})
    assert read_manifest(store).options == IGOptions()


def test_what_describes_a_build_and_not_the_maps_is_no_difference():
    ours, theirs = tiny_manifest(4), tiny_manifest(4, chunk_size=7, batch_images=3, versions={"torch": "1"})
    assert first_difference(ours, theirs) is None
    assert first_difference(ours, tiny_manifest(4, dtype="bfloat16")) == "dtype is 'float32' there, 'bfloat16' here"
    assert first_difference(ours, tiny_manifest(4, compiled=True)) == "compiled is False there, True here"
    assert first_difference(ours, tiny_manifest(5)) == "dataset.num_images is 4 there, 5 here"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "captum", "options": IGOptions(n_steps="auto")}, "n_steps 'auto' needs engine 'fast'"),
        ({"engine": "captum", "dtype": "bfloat16"}, "engine 'captum' computes in eager float32"),
        ({"engine": "captum", "compiled": True}, "engine 'captum' computes in eager float32"),
        ({"engine": "capt"}, r"engine must be one of captum, fast, got 'capt' \(did you mean 'captum'\?\)"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        tiny_manifest(4, **settings)


@pytest.mark.parametrize(("map_size", "shape"), [(None, (16, 32)), (8, (8, 8)), (24, (24, 24)), (32, (16, 32))])
def test_maps_of_a_wide_input_are_square_only_where_they_are_smaller(map_size, shape):
    manifest = tiny_manifest(4, map_size=map_size)
    manifest = replace(manifest, teacher=replace(manifest.teacher, input_size=(3, 16, 32)))
    assert manifest.map_shape == shape


@pytest.mark.parametrize("name", ["map_size", "shard_rows", "chunk_size", "batch_images"])
def test_a_count_that_no_machine_has_is_refused_before_it_is_written(name):
    with pytest.raises(InputError, match=f"{name} must be in"):
        tiny_manifest(4, **{name: 10**20})
