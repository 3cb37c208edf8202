"""Two builds into one folder at once: both succeed, and neither touches what the other is writing."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import IGOptions
from timm_igkd.errors import InputError
from timm_igkd.maps import store_files
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.manifest import Halving, read_manifest
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import save_model
from timm_igkd.records import write_record

IMAGES = ImageList([noise_image(seed) for seed in range(10)], [seed % 2 for seed in range(10)])


def build(folder, n_steps=2):
    options = IGOptions(n_steps=n_steps)
    return compute_maps(tiny_teacher(size=16), IMAGES, folder, options=options, shard_size=4, progress=False)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moment", range(5))
def test_build_finished_while_another_writes_a_file_leaves_that_file(tmp_path, monkeypatch, moment):
    """The second build runs from beginning to end while the first has a temporary file open."""
    build(tmp_path / "alone")
    real, files, found = os.fsync, [], []

    def fsync(descriptor):
        files.append(descriptor)
        if len(files) == moment + 1:  # manifest, three shards, card
            before = set((tmp_path / "both").rglob(".*.tmp"))
            monkeypatch.setattr(os, "fsync", real)
            build(tmp_path / "both")
            assert before
            assert before <= set((tmp_path / "both").rglob(".*.tmp"))
            found.append(MapStore(tmp_path / "both"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    build(tmp_path / "both").verify(IMAGES)
    found[0].verify(IMAGES)
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")


def test_build_that_comes_a_moment_later_with_other_settings_is_refused(tmp_path, monkeypatch):
    """Both find no manifest; the other one is written first."""
    other = build(tmp_path / "other", n_steps=3)

    def write_second(path, record, replace):
        write_record(path, read_manifest(other.path))
        write_record(path, record, replace)

    monkeypatch.setattr(store_files, "write_record", write_second)
    with pytest.raises(InputError, match=r"options\.n_steps is 3 there, 2 here"):
        build(tmp_path / "maps")
    assert read_manifest(tmp_path / "maps").options.n_steps == 3
    assert not (tmp_path / "maps" / "data").exists()


def test_damaged_shard_stays_until_its_successor_takes_its_place(tmp_path, monkeypatch):
    store = build(tmp_path / "maps")
    shard = sorted((store.path / "data").glob("*.parquet"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    monkeypatch.setattr("timm_igkd.maps.shard_builder.write_shard", lambda path, *_: pytest.fail(str(path.exists())))
    with pytest.raises(pytest.fail.Exception, match="True"):
        build(store.path)
    monkeypatch.undo()
    build(store.path)
    assert shard.read_bytes() == whole


@pytest.mark.slow
def test_two_commands_at_once_end_with_0_and_the_bytes_of_one(command, tiny_images, tmp_path):
    save_model(tiny_teacher(size=16), tmp_path / "teacher")
    flags = ["--teacher", f"local-dir:{tmp_path / 'teacher'}", "--dataset", str(tiny_images(n=60)), "--split", "train"]
    flags += ["--n-steps", "50", "--shard-size", "2", "--logits", "--out"]
    assert command("maps", *flags, tmp_path / "alone").code == 0
    words = [sys.executable, "-m", "timm_igkd", "maps", *flags, str(tmp_path / "both")]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")


def test_processes_agree_whether_a_store_is_whole_though_another_call_adds_to_it(tmp_path, monkeypatch):
    counted: list[int] = []

    def broadcast(values):
        counted.extend(values)
        return [0]  # what the first process found, before the last shard was there

    monkeypatch.setattr("timm_igkd.maps.build.broadcast_object_list", broadcast)
    assert build(tmp_path) is None
    assert counted[0] > 0
    assert not (tmp_path / "provenance.json").exists()


def test_smaller_chunks_of_another_process_are_not_forgotten(tmp_path, monkeypatch):
    """Both run out of memory; the manifest tells of each."""
    real, other = FastEngine.attribute, Halving(row=8, chunk_size=2)

    def attribute(self, *args):
        found = read_manifest(tmp_path)
        if not found.out_of_memory_halvings:
            write_record(tmp_path / "manifest.json", replace(found, chunk_size=2, out_of_memory_halvings=(other,)))
            raise torch.cuda.OutOfMemoryError("simulated")
        return real(self, *args)

    monkeypatch.setattr(FastEngine, "attribute", attribute)
    made = build(tmp_path).provenance
    assert len(made.out_of_memory_halvings) == 2
    assert made.out_of_memory_halvings[0] == other
    assert made.out_of_memory_halvings[1].chunk_size > made.chunk_size == 2
