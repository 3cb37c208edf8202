"""A store's rows are converted when one is first read: who builds, opens, verifies or pushes it needs no copy."""

import errno
import multiprocessing
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from store_parts import altered, build, shards_of
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store

from timm_igkd.errors import InputError, RunError
from timm_igkd.files import atomic_file
from timm_igkd.maps import arrow_cache
from timm_igkd.maps.build import recompute_rows
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset

N = 10
IMAGES = ImageList([noise_image(index) for index in range(N)], [index % 2 for index in range(N)])
MAPS = [ramp(index, 16, 16) for index in range(N)]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path, cache) -> MapStore:
    return write_store(tmp_path / "maps", IMAGES, MAPS, shard_size=4)


def test_building_opening_and_verifying_copy_nothing(tmp_path, cache):
    store = build(tiny_teacher(classes=2, size=16), IMAGES, tmp_path / "maps")
    assert len(store) == N
    MapStore(store.path).verify(IMAGES)
    assert recompute_rows(MapStore(store.path), tiny_teacher(classes=2, size=16), IMAGES, 3).levels == 0
    assert not cache.exists()
    assert store.row(0).label == 0
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_overlay_maps_the_rows_before_workers_start(store, cache):
    IGOverlayDataset(IMAGES, store, IGOverlay(overlay_prob=1.0))
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_threads_that_read_at_once_read_the_same_rows(store, monkeypatch):
    converted = []
    convert = arrow_cache._convert
    monkeypatch.setattr(arrow_cache, "_convert", lambda *args: converted.append(args) or convert(*args))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.levels, [row % N for row in range(80)]))
    assert all(np.array_equal(levels, MAPS[row % N]) for row, levels in enumerate(found))
    assert len(converted) == 1


def test_processes_that_read_at_once_convert_once(store, cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(store.levels, range(4))
    assert all(np.array_equal(levels, MAPS[row]) for row, levels in enumerate(found))
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_rows_are_found_from_another_folder_than_the_store_was_opened_in(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = MapStore("maps")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.array_equal(opened.levels(3), MAPS[3])
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).levels(4), MAPS[4])


def test_store_that_is_another_before_its_first_row_is_read_is_refused(store):
    write_store(store.path, IMAGES, MAPS[:6], shard_size=4)
    with pytest.raises(InputError, match="is another than it was when it was opened"):
        store.levels(0)


def test_shard_of_other_columns_or_rows_is_refused_when_the_store_is_opened(store):
    first, _, third = shards_of(store.path)
    first.write_bytes(third.read_bytes())
    with pytest.raises(InputError, match=rf"{re.escape(first.name)}' has 2 rows, expected 4; delete it"):
        MapStore(store.path)


def test_altered_row_is_refused_when_it_is_read(store):
    altered(store.path, 5, scale=2.0)
    opened = MapStore(store.path)
    assert np.array_equal(opened.levels(4), MAPS[4])
    with pytest.raises(InputError, match="row 5 of map store"):
        opened.levels(5)


@pytest.mark.parametrize("failing", ["fsync", "mkdir"])
def test_cache_that_cannot_be_written_is_named_with_its_variable(failing, store, cache, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(RunError, match=r"cache .*/cache/timm_igkd' .No space left .*HF_DATASETS_CACHE$") as caught:
        store.levels(0)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    assert list(cache.rglob("*.tmp")) == []


def test_full_disk_is_a_line_and_the_same_store_goes_on_elsewhere(store, small_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(small_disk("full", "4k")))
    with pytest.raises(RunError, match=r"cannot be written into the cache .*full.*HF_DATASETS_CACHE"):
        store.levels(0)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "roomy"))
    assert np.array_equal(store.levels(0), MAPS[0])


def test_leftovers_of_killed_conversions_go_with_the_next_one(store, cache):
    folder = cache / "timm_igkd"
    (folder / "folders").mkdir(parents=True)
    left, others = folder / f".{'0' * 32}-{'1' * 32}.arrow.0a1b2c3d.tmp", folder / "folders" / ".x.0a1b2c3d.tmp"
    left.write_bytes(b"half")
    others.write_bytes(b"of a data set")
    with atomic_file(folder / "other.arrow") as alive:  # of a conversion that goes on
        store.map_rows()
        assert Path(alive.name).exists()
    assert not left.exists()
    assert others.exists()
