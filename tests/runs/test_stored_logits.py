"""--stored-logits: a run that reads no map computes none; what it stores are the teacher's answers alone."""

import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_lines import Runner, tiny_run, two_splits

from timm_igkd import IGOptions, MapStore, RunConfig, compute_maps, load_labeled_images, load_model
from timm_igkd.errors import InputError


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.fixture
def flags(images, teacher_folder) -> list[object]:
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    return tiny_run(images, *teacher, "--overlay-prob", 0, "--stored-logits")


@pytest.mark.parametrize("road", ["workers", "device"])
def test_run_without_overlay_stores_logits_alone(road, recipe: Runner, flags, tmp_path):
    outcome = recipe(*flags, "--batches", road)
    assert outcome.code == 0, outcome.error
    run = tmp_path / "runs" / "run"
    store = MapStore(run / "maps")
    assert (store.provenance.options.method, store.has_logits, len(store)) == ("none", True, 16)
    page = (run / "report" / "index.html").read_text()
    assert "This run used no maps." in page
    assert not re.search(r"16 \S+ maps", page)
    assert "Stored logits" in page
    assert "map_baseline" in page  # a setting, which changed nothing
    assert "options.baseline" not in page
    outcome = recipe(*flags, "--batches", road)
    assert "maps: complete, skipped" in outcome.output


def test_student_is_that_of_logits_beside_maps(recipe: Runner, flags, images, teacher_folder, tmp_path):
    dataset = load_labeled_images(str(images), "train")
    teacher, options = load_model(f"local-dir:{teacher_folder}"), IGOptions(n_steps=2, baseline="black")
    compute_maps(teacher, dataset, tmp_path / "store", options=options, logits=True, progress=False)
    for name, more in {"alone": [], "beside": ["--maps", tmp_path / "store"]}.items():
        outcome = recipe(*flags, *more, "--name", name)
        assert outcome.code == 0, outcome.error
    found = [
        safetensors.torch.load_file(tmp_path / "runs" / name / "student" / "model.safetensors")
        for name in ("alone", "beside")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_store_of_logits_is_taken_where_no_map_is_read_and_refused_where_one_is(
    recipe: Runner, command: Runner, flags, images, teacher_folder, tmp_path
):
    data = ["--dataset", images, "--split", "train", "--teacher", f"local-dir:{teacher_folder}"]
    assert command("maps", *data, "--method", "none", "--out", tmp_path / "logits").code == 0
    outcome = recipe(*flags, "--maps", tmp_path / "logits")
    assert outcome.code == 0, outcome.error
    outcome = recipe(*flags, "--maps", tmp_path / "logits", "--overlay-prob", 0.5, "--name", "overlaid")
    assert (outcome.code, "holds logits alone; build maps into" in outcome.error) == (2, True)
    assert not (tmp_path / "runs" / "overlaid").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_overlay_asked_for_later_is_refused_before_anything_is_written(finished, recipe: Runner, flags, tmp_path):
    assert recipe(*flags).code == 0
    run = tmp_path / "runs" / "run"
    for marker in (run / ".stages").iterdir():  # as a run that was killed before its student's first epoch ended
        if marker.stem not in ("teacher", "maps"):
            marker.unlink()
    if not finished:
        (run / "maps" / "provenance.json").unlink()
    before = (run / "config.yaml").read_bytes()
    outcome = recipe(*flags, "--overlay-prob", 0.5)
    assert outcome.code == 2
    assert "holds logits alone: it was begun by a run without overlay" in outcome.error
    assert (run / "config.yaml").read_bytes() == before
    shutil.rmtree(run / "maps")
    outcome = recipe(*flags, "--overlay-prob", 0.5)
    assert outcome.code == 0, outcome.error
    assert MapStore(run / "maps").provenance.options.method == "ig"


def test_map_method_none_makes_no_overlay():
    with pytest.raises(InputError, match="read maps, map_method none makes none"):
        RunConfig(map_method="none", overlay_prob=0.1)
    assert RunConfig(map_method="none", overlay_prob=0.0, stored_logits=True).n_steps == 0
