"""The memory-mapped rows of a store: what they hold, when they are written again, what they keep out of a process."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.errors import InputError
from timm_igkd.maps import arrow_cache
from timm_igkd.maps.arrow_cache import arrow_file, mapped_table
from timm_igkd.maps.store import MapStore

N, SHARD = 7, 3


@pytest.fixture
def store(tmp_path, monkeypatch) -> MapStore:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = ImageList([noise_image(index) for index in range(N)], [index % 2 for index in range(N)])
    store = write_store(tmp_path / "maps", images, [ramp(index, 16, 16) for index in range(N)], shard_size=SHARD)
    store.map_rows()
    return store


def mapped(folder: Path) -> MapStore:
    """Open a store, and have its rows converted where they are not yet."""
    store = MapStore(folder)
    store.map_rows()
    return store


def shards_of(store: MapStore) -> list[Path]:
    return sorted((store.path / "data").glob("*.parquet"))


def cached(store: MapStore) -> list[Path]:
    return sorted((store.path.parent / "cache").rglob("*.arrow"))


def test_table_holds_the_rows_of_all_shards_in_order(store):
    wanted = datasets.load_dataset("parquet", data_files=[str(path) for path in shards_of(store)], split="train")
    table = mapped_table(arrow_file(shards_of(store), store.provenance))
    assert table.num_rows == N
    for column in ("key", "label", "row_hash", "scale", "n_steps", "converged"):
        assert table.column(column).to_pylist() == wanted[column][:]
    for row in range(N):
        assert np.array_equal(store.levels(row), ramp(row, 16, 16))


def test_shards_are_converted_once(store):
    (first,) = cached(store)
    changed = first.stat().st_mtime_ns
    mapped(store.path)
    assert [path.stat().st_mtime_ns for path in cached(store)] == [changed]


def test_processes_that_open_a_store_at_once_convert_it_once(store, monkeypatch):
    (first,) = cached(store)
    first.unlink()
    converted: list[Path] = []
    convert = arrow_cache._convert

    def slowly(shards, manifest, path):
        converted.append(path)
        time.sleep(0.2)
        convert(shards, manifest, path)

    monkeypatch.setattr(arrow_cache, "_convert", slowly)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: arrow_file(shards_of(store), store.provenance), range(4)))
    assert files == [first] * 4
    assert converted == [first]


def test_shard_written_again_is_converted_again(store):
    path = shards_of(store)[1]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    (before,) = cached(store)
    assert mapped(store.path).rows[:] == store.rows[:]
    assert cached(store) != [before]


def test_cache_keeps_one_file_of_a_store_and_those_of_others(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "other")
    other = cached(store)
    mapped(tmp_path / "other")
    for path in shards_of(store):
        os.utime(path)
        mapped(store.path)
    assert len(cached(store)) == 2
    assert not {*other} & {*cached(store)}
    assert len(list((tmp_path / "cache").rglob("*.lock"))) == 2
    assert np.array_equal(store.levels(4), ramp(4, 16, 16))  # of the file that it has mapped


def test_file_of_another_user_stays_and_the_store_opens(store, monkeypatch):
    def refuse(self, missing_ok=False):
        if self.suffix == ".arrow":
            raise PermissionError(1, "Operation not permitted")
        unlink(self, missing_ok)

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", refuse)
    os.utime(shards_of(store)[0])
    assert len(mapped(store.path)) == N
    assert len(cached(store)) == 2


def test_pickle_of_a_store_that_was_touched_since_maps_the_new_file(store):
    data = pickle.dumps(store)
    os.utime(shards_of(store)[0])
    mapped(store.path)
    assert np.array_equal(pickle.loads(data).levels(4), ramp(4, 16, 16))
    assert store.rows[4]["key"] == mapped(store.path).rows[4]["key"]
    assert len(cached(store)) == 1


def test_a_file_that_is_replaced_before_it_is_mapped_is_no_damage(store, monkeypatch):
    """Another process sees the shards touched, and converts them, between the look for the file and its mapping."""
    paths = iter([store.path.parent / "gone.arrow"])
    real = arrow_cache.arrow_file
    monkeypatch.setattr("timm_igkd.maps.store.arrow_file", lambda *args: next(paths, None) or real(*args))
    assert np.array_equal(mapped(store.path).levels(4), ramp(4, 16, 16))
    assert next(paths, "used") == "used"


def test_pickle_of_a_store_that_is_another_since_is_one_line(store):
    data = pickle.dumps(store)
    shutil.rmtree(store.path)
    images = ImageList([noise_image(index + 1) for index in range(N)], [0] * N)
    write_store(store.path, images, [ramp(index, 16, 16) for index in range(N)], shard_size=SHARD).map_rows()
    with pytest.raises(InputError, match=r"^map store '.*maps' is another than it was when it was opened; run"):
        pickle.loads(data).levels(0)


def test_pickle_carries_no_rows(store):
    data = pickle.dumps(store)
    assert len(data) < 5000
    assert pickle.loads(data).find(noise_image(4), 0, None, "an image") == 4


def test_rows_are_a_dataset_with_undecoded_maps(store):
    rows = store.rows
    assert isinstance(rows, datasets.Dataset)
    assert rows.features["map"] == datasets.Image(decode=False)
    assert rows[2]["map"]["bytes"].startswith(b"\x89PNG")


def test_cut_shard_is_named_and_leaves_no_cache(store):
    path = shards_of(store)[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"shard {re.escape(repr(str(path)))} is corrupt"):
        MapStore(store.path)
    assert len(cached(store)) == 1
    assert not list(cached(store)[0].parent.glob(".*"))


@pytest.mark.parametrize("length", [0, 100, -100])
def test_damaged_cache_is_named_with_the_remedy(store, length):
    (path,) = cached(store)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=f"cached maps {re.escape(repr(str(path)))} are damaged .*delete that file"):
        mapped(store.path)
    path.unlink()
    assert mapped(store.path).rows[:] == store.rows[:]


@pytest.mark.slow
def test_training_process_imports_no_datasets_nor_pandas(store):
    """`timm-igkd run` has a budget of 10 % of a small training's memory; these two would take most of it."""
    program = (
        "import sys, pickle, timm_igkd\n"
        f"maps = pickle.loads(pickle.dumps(timm_igkd.MapStore({str(store.path)!r})))\n"
        "maps.overlay_map(0)\n"
        "print([name for name in ('datasets', 'pandas', 'captum') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_link_to_itself_in_the_place_of_a_shard_is_one_line(store):
    path = shards_of(store)[1]
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(InputError, match=r"is corrupt .*Too many levels of symbolic links.*; delete it and run"):
        MapStore(store.path)
