"""--maps: a store that is there is verified and used, neither built again nor copied; --img-size: what models read."""

import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from command_lines import Runner, tiny_run, two_splits
from tiny_parts import tiny_teacher

from timm_igkd import IGOptions, MapStore, compute_maps, load_labeled_images, load_model, save_model
from timm_igkd.errors import InputError
from timm_igkd.models.truncation import truncate

# ---- a store that is there ----


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.fixture
def options(teacher_folder) -> list[object]:
    return ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}", "--overlay-prob", 0.5]


@pytest.fixture
def store(images, teacher_folder, tmp_path) -> Path:
    """Return the maps of the teacher and the training split, as `timm-igkd maps` leaves them."""
    dataset = load_labeled_images(str(images), "train")
    teacher = load_model(f"local-dir:{teacher_folder}")
    compute_maps(teacher, dataset, tmp_path / "store", options=IGOptions(n_steps=2), progress=False)
    return tmp_path / "store"


@pytest.fixture
def build(monkeypatch):
    """Let a run that builds maps fail."""
    monkeypatch.setattr("timm_igkd.runs.data.compute_maps", lambda *args, **kwargs: pytest.fail("maps were built"))


def test_given_maps_are_used_and_not_built_again(recipe: Runner, images, options, store, build, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    outcome = recipe(*tiny_run(images, *options, "--maps", store))
    assert outcome.code == 0, outcome.error
    run = tmp_path / "runs" / "run"
    assert (run / "maps").is_symlink()
    assert len(MapStore(run / "maps")) == 16
    assert "integrated-gradients maps" in (run / "report" / "index.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    monkeypatch.chdir(store.parent)
    again = recipe(*tiny_run(images, *options, "--maps", f"./{store.name}"))
    assert again.code == 0, again.error
    assert again.output.count("complete, skipped") == outcome.output.count(": done in")


def test_score_of_given_maps_comes_onto_the_page(recipe: Runner, command: Runner, images, options, store, tmp_path):
    flags, page = tiny_run(images, *options, "--maps", store), tmp_path / "runs" / "run" / "report" / "index.html"
    assert recipe(*flags).code == 0
    (tmp_path / "link").symlink_to(store)
    data = ["--dataset", images, "--split", "train", *options[2:4], "--steps", 2]
    assert command("score", "--maps", store, *data, "--out", tmp_path / "link" / "score.json").code == 0
    assert "## How faithful the maps are" in (store / "README.md").read_text()
    assert recipe(*flags).code == 0
    assert '<section id="faithfulness">' in page.read_text()


def test_given_maps_train_the_student_that_built_ones_do(recipe: Runner, images, options, store, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    runs = {"built": [], "given": ["--maps", store]}
    for name, more in runs.items():
        assert recipe(*tiny_run(images, *options, *more, "--name", name)).code == 0
    found = [safetensors.torch.load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in runs]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n-steps", 3], "made with n_steps 2, this run asks for 3; set n_steps to 2"),
        (["--map-baseline", "black"], "made with map_baseline mean, this run asks for black"),
        (["--stored-logits"], "has no logits"),
        (["--train-limit", 8], "are of 16 images, split 'train' gives 8"),
        (
            ["--teacher-mean", 0, 0, 0],
            r"than this run's: its mean is \[.*\] there, \[0.* here; give the same --teacher-mean.*, or drop --maps",
        ),
        (
            ["--teacher-args", "act_layer=gelu"],
            "weights with other arguments: it answers otherwise; give the same --teacher-args, or drop --maps",
        ),
        (["--overlay-prob", 0], "maps are not read where overlay_prob and explanation_loss_weight are 0"),
        (["--teacher-epochs", 1], "maps of a teacher that this run trains cannot be there yet"),
        (["--maps", "./absent"], "absent"),
    ],
)
def test_maps_that_do_not_belong_leave_no_folder(
    more, message, recipe: Runner, images, options, store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = recipe(*tiny_run(images, *options, "--maps", store, *more))
    assert outcome.code == 2
    assert re.search(message, outcome.error), outcome.error
    assert not (tmp_path / "runs").exists()


def test_maps_of_other_weights_leave_no_folder(recipe: Runner, images, options, store, teacher_folder, tmp_path):
    save_model(tiny_teacher(classes=2, size=16, seed=5), teacher_folder)
    outcome = recipe(*tiny_run(images, *options, "--maps", store))
    assert outcome.code == 2
    assert (
        "another teacher than this run's: weights differ; give the teacher that they were made with, or"
        in outcome.error
    )
    assert not (tmp_path / "runs").exists()


def test_maps_of_other_images_are_refused_before_a_student_is_trained(
    recipe: Runner, images, options, store, tiny_images, tmp_path
):
    tiny_images(n=16, split="train", seed=1)  # in place of those that have maps
    outcome = recipe(*tiny_run(images, *options, "--maps", store))
    assert outcome.code == 2
    assert "row 0 does not belong to image 0" in outcome.error
    run = tmp_path / "runs" / "run"
    assert not (run / "maps").exists()
    assert not (run / "student").exists()


def test_exchanged_store_of_a_finished_run_is_refused(recipe: Runner, images, options, store, tmp_path):
    assert recipe(*tiny_run(images, *options, "--maps", store)).code == 0
    (shard,) = (store / "data").glob("*.parquet")
    shard.write_bytes(shard.read_bytes() + b"x")
    outcome = recipe(*tiny_run(images, *options, "--maps", store))
    assert outcome.code == 2
    assert "made with other maps than are there now" in outcome.error


def test_store_rebuilt_with_other_settings_before_the_student_began_is_refused(
    recipe: Runner, images, options, store, teacher_folder, tmp_path, monkeypatch
):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("timm_igkd.runs.students.StudentRun.train", stop)
        assert recipe(*tiny_run(images, *options, "--maps", store)).code == 130
    shutil.rmtree(store)
    dataset, teacher = load_labeled_images(str(images), "train"), load_model(f"local-dir:{teacher_folder}")
    compute_maps(teacher, dataset, store, options=IGOptions(n_steps=3), progress=False)
    outcome = recipe(*tiny_run(images, *options, "--maps", store))
    assert outcome.code == 2
    assert "made with n_steps 3, this run asks for 2" in outcome.error
    assert not (tmp_path / "runs" / "run" / "student").exists()


@pytest.fixture
def left_before_its_student(recipe: Runner, images, options, store, tmp_path, monkeypatch):
    """A run with --maps current, a link to `store`, that was interrupted once it had linked to that."""
    (tmp_path / "current").symlink_to(store)

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("timm_igkd.runs.students.StudentRun.train", stop)
        assert recipe(*tiny_run(images, *options, "--maps", tmp_path / "current")).code == 130
    return tmp_path / "runs" / "run"


@pytest.fixture
def others(images, teacher_folder, tmp_path) -> Path:
    """Return maps of the same teacher and images, made with other settings."""
    dataset, teacher = load_labeled_images(str(images), "train"), load_model(f"local-dir:{teacher_folder}")
    compute_maps(teacher, dataset, tmp_path / "others", options=IGOptions(n_steps=3), progress=False)
    return tmp_path / "others"


@pytest.mark.parametrize("leads", ["to others", "nowhere"])
def test_run_goes_on_with_the_maps_that_it_linked_to(
    recipe: Runner, images, options, left_before_its_student, others, leads, tmp_path
):
    (tmp_path / "current").unlink()
    if leads == "to others":
        (tmp_path / "current").symlink_to(others)
    outcome = recipe(*tiny_run(images, *options, "--maps", tmp_path / "current"))
    assert outcome.code == 0, outcome.error
    assert MapStore(left_before_its_student / "maps").provenance.options.n_steps == 2


def test_linked_maps_that_were_rebuilt_are_refused_wherever_the_name_leads_now(
    recipe: Runner, images, options, store, left_before_its_student, others, tmp_path
):
    store.rename(tmp_path / "good")
    others.rename(store)
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "good")
    outcome = recipe(*tiny_run(images, *options, "--maps", tmp_path / "current"))
    assert outcome.code == 2
    assert "made with n_steps 3, this run asks for 2" in outcome.error


def test_finished_run_bears_that_its_store_is_unfinished_for_a_while(recipe: Runner, images, options, store, tmp_path):
    command = tiny_run(images, *options, "--maps", store)
    assert recipe(*command).code == 0
    (store / "provenance.json").rename(tmp_path / "provenance.json")
    outcome = recipe(*command)
    assert (outcome.code, "is not complete" in outcome.error) == (2, True)
    (tmp_path / "provenance.json").rename(store / "provenance.json")
    outcome = recipe(*command)
    assert outcome.code == 0, outcome.error
    assert "student: complete, skipped" in outcome.output


def test_maps_of_its_own_are_not_built_into_a_store_that_an_earlier_call_linked_to(
    recipe: Runner, images, options, store, left_before_its_student
):
    run = left_before_its_student
    (run / ".stages" / "maps.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 0, outcome.error
    assert not (run / "maps").is_symlink()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


# ---- the size that models read ----


@pytest.mark.parametrize("student", ["test_resnet", "test_vit", "test_mambaout", "none"])
def test_image_size_holds_for_both_models_and_comes_back_from_their_folders(
    student, recipe: Runner, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    teacher = ["--teacher", "test_vit", "--overlay-prob", 1]
    models = ["--student", student, *(["--student-drop", 1] if student == "none" else [])]
    outcome = recipe(*tiny_run(images, *teacher, *models, "--img-size", 48))
    assert outcome.code == 0, outcome.error
    run = tmp_path / "runs" / "run"
    for name in ("teacher", "student"):
        model = timm.create_model(f"local-dir:{run / name}", pretrained=True).eval()
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 48, 48)
        assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    store = MapStore(run / "maps")
    assert store.levels(0).shape == (48, 48)
    assert store.provenance.teacher.input_size == (3, 48, 48)


def test_positional_embeddings_of_a_pretrained_student_are_resampled(tmp_path):
    saved = tiny_teacher("test_vit", classes=3, size=32)
    save_model(saved, tmp_path / "vit")
    found = load_model(f"local-dir:{tmp_path / 'vit'}", img_size=64)
    expected = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True, img_size=64)
    assert found.pos_embed.shape != saved.pos_embed.shape
    assert torch.equal(found.pos_embed, expected.pos_embed)
    assert torch.equal(found.head.weight, saved.head.weight)


def test_truncated_vit_of_a_fixed_size_is_not_resampled_and_says_so(tmp_path):
    saved = truncate(tiny_teacher("test_vit", classes=3, size=32), 1).eval()
    save_model(saved, tmp_path / "cut")
    with pytest.raises(InputError, match=r"do not fit model .*pos_embed"):
        load_model(f"local-dir:{tmp_path / 'cut'}", img_size=64)


def test_image_size_that_the_architecture_cannot_take_leaves_no_folder(recipe: Runner, images, tmp_path):
    outcome = recipe(*tiny_run(images, "--teacher", "test_vit", "--img-size", 17, "--student", "test_resnet"))
    assert outcome.code == 2
    assert "'test_vit' cannot read images of 17 x 17 pixels" in outcome.error
    assert not (tmp_path / "runs").exists()
