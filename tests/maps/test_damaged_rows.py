"""A row that is not the one that was written is refused wherever it is read, also where its hash was made to fit."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, tiny_manifest, write_store

from timm_igkd.attribution.options import IGOptions
from timm_igkd.errors import InputError
from timm_igkd.maps import push
from timm_igkd.maps.push import push_maps
from timm_igkd.maps.row_format import MapRow, encode_png, read_row, row_hash, to_table
from timm_igkd.maps.store import MapStore

N, CLASSES, ROW = 6, 3, 4
IMAGES = ImageList([noise_image(seed) for seed in range(N)], [seed % CLASSES for seed in range(N)], "noise")
Cells = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    logits = np.random.default_rng(0).normal(size=(N, CLASSES)).astype(np.float32)
    maps = [ramp(index, 16, 12) for index in range(N)]
    return write_store(tmp_path_factory.mktemp("rows") / "maps", IMAGES, maps, logits=logits, shard_size=3).path


@pytest.fixture
def rewrite(built, tmp_path) -> Callable[..., MapStore]:
    """Return a function that opens a copy of the store after it changed the rows, all at once."""

    def change(alter: Callable[[list[Cells]], Any], schema: pa.Schema | None = None) -> MapStore:
        folder = Path(shutil.copytree(built, tmp_path / "maps"))
        shards = sorted((folder / "data").glob("*.parquet"))
        tables = [pq.read_table(path) for path in shards]
        rows = [row for table in tables for row in table.to_pylist()]
        rows = alter(rows) or rows
        for number, path in enumerate(shards):
            part = rows[3 * number : 3 * number + 3]
            pq.write_table(pa.Table.from_pylist(part, schema=schema or tables[0].schema), path)
        return MapStore(folder)

    return change


def png(image: Image.Image) -> Cells:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def hash_of(cells: Cells) -> str:
    """Return the hash that the store's own code would give these cells, as far as it would take them."""
    levels = np.asarray(Image.open(io.BytesIO(cells["map"]["bytes"])).convert("L"))
    logits = None if cells["logits"] is None else np.asarray(cells["logits"], np.float32)
    numbers = [cells[name] for name in ("scale", "convergence_delta", "n_steps", "converged")]
    return row_hash(MapRow(cells["key"], cells["label"], levels, *numbers, logits))


HUGE = png(Image.new("1", (9000, 9000)))["bytes"][:1000]  # a header that promises more than the file holds
GREY = np.asarray(ramp(0, 16, 12))
# What a row may not hold, and how the refusal says it.
WRONG: dict[str, tuple[Cells, str]] = {
    "NaN logits": ({"logits": [0.0, float("nan"), 1.0]}, "its logits are 3 numbers, expected 3 finite ones"),
    "infinite logits": ({"logits": [0.0, float("inf"), 1.0]}, "its logits are 3 numbers, expected 3 finite ones"),
    "a null logit": ({"logits": [0.0, None, 1.0]}, "its logits are 3 numbers, expected 3 finite ones"),
    "short logits": ({"logits": [0.0, 1.0]}, "its logits are 2 numbers, expected 3 finite ones"),
    "no logits": ({"logits": []}, "its logits are 0 numbers, expected 3 finite ones"),
    "NaN scale": ({"scale": float("nan")}, "its scale is nan"),
    "infinite scale": ({"scale": float("inf")}, "its scale is inf"),
    "negative scale": ({"scale": -1.0}, "its scale is -1"),
    "NaN delta": ({"convergence_delta": float("nan")}, "its convergence_delta is nan"),
    "other steps": ({"n_steps": 7}, "its n_steps is 7, expected 1"),
    "not converged": ({"converged": False}, "converged False, expected True"),
    "RGB map": ({"map": png(Image.new("RGB", (16, 12)))}, "16x12 of mode 'RGB', expected 16x12 of 8-bit greyscale 'L'"),
    "1-bit map": ({"map": png(Image.new("1", (16, 12)))}, "its map is 16x12 of mode '1'"),
    "16-bit map": ({"map": png(Image.fromarray(GREY.astype(np.uint16)))}, "its map is 16x12 of mode 'I;16'"),
    "palette map": ({"map": png(Image.fromarray(GREY).convert("P"))}, "its map is 16x12 of mode 'P'"),
    "map with alpha": ({"map": png(Image.fromarray(GREY).convert("LA"))}, "its map is 16x12 of mode 'LA'"),
    "1x1 map": ({"map": png(Image.new("L", (1, 1)))}, "its map is 1x1 of mode 'L', expected 16x12 of"),
    "huge map": ({"map": {"bytes": HUGE, "path": None}}, "its map is 9000x9000 of mode '1', expected 16x12 of"),
    "no PNG": ({"map": {"bytes": b"GIF89a", "path": None}}, "its map cannot be decoded as PNG"),
    "cut map": (
        {"map": {"bytes": encode_png(GREY)[:-30], "path": None}},
        "its map cannot be decoded as PNG",
    ),
    "turned map": ({"map": png(Image.new("L", (12, 16)))}, "its map is 12x16 of mode 'L', expected 16x12 of"),
}
UNREADABLE = ("huge map", "no PNG", "cut map")
NULLS = ["label", "map", "scale", "convergence_delta", "n_steps", "converged", "logits", "row_hash", "key"]


def read_all(store: MapStore) -> None:
    for row in range(len(store)):
        store.overlay_map(row)


def refused_by_every_reader(store: MapStore, reason: str, monkeypatch) -> None:
    """Expect the refusal of row 4 in `verify`, in `push_maps`, and when its map, levels or logits are read."""
    monkeypatch.setattr(push, "require_login", lambda repo_id: None)
    monkeypatch.setattr(push, "publish", lambda publication: pytest.fail("published"))
    with pytest.raises(InputError, match=rf"the map of image {ROW} of 'noise' \(row {ROW}\) is damaged: .*{reason}"):
        store.verify(IMAGES)
    with pytest.raises(InputError, match=rf"row {ROW % 3} of shard .*00001-of-00002.parquet' is damaged: .*{reason}"):
        push_maps(store.path, "user/maps")
    for read in (store.overlay_map, store.levels, store.float_map, store.logits):
        with pytest.raises(InputError, match=rf"row {ROW} of map store .*maps' is damaged: .*{reason}") as caught:
            read(ROW)
        assert "\n" not in str(caught.value)
    assert store.levels(0).shape == (12, 16)  # the others can be read


def test_rows_as_they_were_written_pass_everywhere(rewrite, monkeypatch):
    store = rewrite(lambda rows: None)
    monkeypatch.setattr(push, "require_login", lambda repo_id: None)
    monkeypatch.setattr(push, "publish", lambda publication: publication.repo_id)
    store.verify(IMAGES)
    read_all(store)
    assert push_maps(store.path, "user/maps") == "user/maps"


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("hash_fits", [False, True])
def test_cell_that_no_row_can_hold_is_refused_whatever_its_hash(rewrite, monkeypatch, name, hash_fits):
    cells, reason = WRONG[name]

    def alter(rows):
        rows[ROW] |= cells
        if hash_fits and None not in (cells.get("logits") or ()) and name not in UNREADABLE:
            rows[ROW]["row_hash"] = hash_of(rows[ROW])

    refused_by_every_reader(rewrite(alter), reason, monkeypatch)


@pytest.mark.parametrize("column", NULLS[:-1])
def test_null_is_refused(rewrite, monkeypatch, column):
    reason = "its hash differs" if column == "row_hash" else "its logits|is null|expected 1, and converged None"
    if column == "label":  # found before the row is read: no image has this label
        with pytest.raises(InputError, match=rf"row {ROW} has label None"):
            rewrite(lambda rows: rows[ROW].update(label=None)).verify(IMAGES)
        return
    refused_by_every_reader(rewrite(lambda rows: rows[ROW].update({column: None})), f"({reason})", monkeypatch)


PERMUTED = {
    "maps with their scales": ("map", "scale"),
    "hashes": ("row_hash",),
    "logits": ("logits",),
    "maps, scales and hashes": ("map", "scale", "row_hash"),
    "all but key and label": ("map", "scale", "convergence_delta", "n_steps", "converged", "logits", "row_hash"),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_cells_permuted_between_rows_are_refused(rewrite, monkeypatch, name):
    def alter(rows):
        first, second = rows[ROW], rows[ROW + 1]
        for column in PERMUTED[name]:
            first[column], second[column] = second[column], first[column]

    refused_by_every_reader(rewrite(alter), "its hash differs", monkeypatch)


def test_whole_rows_permuted_are_found_by_their_key_but_pass_neither_verify_nor_push(rewrite, monkeypatch):
    monkeypatch.setattr(push, "require_login", lambda repo_id: None)
    store = rewrite(lambda rows: rows[::-1])
    for index, (image, label) in enumerate(zip(IMAGES.images, IMAGES.labels, strict=True)):
        row = store.find(image, label, index, "image")
        assert row == N - 1 - index
        assert np.array_equal(store.levels(row), ramp(index, 16, 12))
    with pytest.raises(InputError, match="row 0 does not belong to image 0"):
        store.verify(IMAGES)
    with pytest.raises(InputError, match="are in another order than when it was finished, or were replaced"):
        push_maps(store.path, "user/maps")


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"convergence_delta": 0.25}, {"label": 2}])
def test_number_that_a_row_could_hold_is_refused_by_its_hash(rewrite, change):
    store = rewrite(lambda rows: rows[ROW].update(change))
    with pytest.raises(InputError, match="its hash differs"):
        store.levels(ROW)


@pytest.mark.parametrize("key", [None, "é" * 32, "0" * 64])
def test_image_of_a_row_whose_key_is_no_key_has_no_map(rewrite, key):
    store = rewrite(lambda rows: rows[ROW].update(key=key))
    with pytest.raises(InputError, match="image 4 has no map"):
        store.find(IMAGES.images[ROW], IMAGES.labels[ROW], ROW, "image 4")
    assert store.find(IMAGES.images[1], IMAGES.labels[1], None, "image 1") == 1


def test_a_damaged_row_is_no_matter_to_the_others(rewrite):
    store = rewrite(lambda rows: rows[ROW].update(scale=7.0))
    assert [store.logits(row).shape for row in range(N) if row != ROW] == [(CLASSES,)] * (N - 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row_hash": None}, "column 'row_hash' is missing, expected string"),
        ({"logits": None}, "column 'logits' is missing, expected list"),
        ({"map": pa.binary()}, "column 'map' is binary, expected struct"),
        ({"label": pa.string()}, "column 'label' is string, expected int64"),
    ],
)
def test_other_columns_are_refused_in_one_line(built, tmp_path, columns, message):
    folder = Path(shutil.copytree(built, tmp_path / "maps"))
    path = sorted((folder / "data").glob("*.parquet"))[0]
    table = pq.read_table(path)
    for name, kind in columns.items():
        place = table.schema.get_field_index(name)
        table = table.remove_column(place)
        if kind is not None:
            table = table.add_column(place, name, pa.array([None] * len(table), type=kind))
    pq.write_table(table, path)
    with pytest.raises(InputError, match=rf"shard .* is corrupt \({message}") as caught:
        MapStore(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "", "é" * 32, "0" * 31, "0" * 31 + "\n", "G" * 32])
def test_key_that_is_no_hash_is_refused(key):
    row = MapRow("0" * 32, 0, GREY, 1.0, 0.0, 1, True)
    manifest = tiny_manifest(1)
    cells = to_table([row]).to_pylist()[0] | {"key": key}
    with pytest.raises(InputError, match="it is damaged: its key is"):
        read_row(cells, manifest, "it")


@pytest.mark.parametrize(
    ("steps", "converged", "reason"),
    [
        (1, True, None),
        (64, False, None),
        (0, True, "its n_steps is 0"),
        (65, False, "its n_steps is 65"),
        (9, None, "null"),
    ],
)
def test_steps_of_auto_are_within_their_bound(steps, converged, reason):
    row = MapRow("0" * 32, 0, np.zeros((32, 32), np.uint8), 0.0, 0.0, steps, converged or False)
    cells = to_table([row]).to_pylist()[0] | {"converged": converged}
    manifest = tiny_manifest(1, options=IGOptions(n_steps="auto"))
    if reason is None:
        assert read_row(cells, manifest, "it").n_steps == steps
    else:
        with pytest.raises(InputError, match=reason):
            read_row(cells, manifest, "it")


def test_hash_changes_with_every_part_of_a_row():
    row = MapRow("0" * 32, 1, ramp(0, 6, 4), 1.0, 0.5, 3, True, np.array([1, 2], np.float32))
    flipped = row.map.copy()
    flipped[0, 0] ^= 1
    changes: list[Cells] = [{"key": "1" + "0" * 31}, {"label": 2}, {"map": flipped}, {"map": row.map.reshape(6, 4)}]
    changes += [{"scale": 2.0}, {"convergence_delta": -0.5}, {"n_steps": 4}, {"converged": False}]
    changes += [{"logits": None}, {"logits": np.array([2, 1], np.float32)}, {"logits": np.array([], np.float32)}]
    hashes = {row_hash(MapRow(**vars(row) | change)) for change in [{}, *changes]}
    assert len(hashes) == len(changes) + 1
    assert all(len(found) == 32 for found in hashes)


def test_png_of_a_map_is_what_the_reader_takes():
    assert Image.open(io.BytesIO(encode_png(GREY))).mode == "L"
