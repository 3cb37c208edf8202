"""A slip in the kind of an argument, such as a name for an object, is one line of ours from every public function."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store
from torch.utils.data import Dataset, IterableDataset, Subset

import timm_igkd as igkd
from timm_igkd.errors import InputError, InputTypeError, UserError

IMAGES = ImageList([noise_image(index, 32, 32) for index in range(4)], [0, 1, 0, 1])


def called(value: object) -> str:
    """Name a value in a test's id; an object's repr holds its address, which is another in every process."""
    return repr(value) if isinstance(value, str | int | Path | dict) else type(value).__name__


class Stream(IterableDataset):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter([])


class NoLength(Dataset):
    """Items by index, of which nobody knows how many there are."""

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> igkd.MapStore:
    return write_store(tmp_path_factory.mktemp("maps"), IMAGES, [ramp(index) for index in range(4)])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_teacher()


def evaluate(model: Any, images: Any = IMAGES, **options: Any) -> Any:
    return igkd.evaluate(model, images, measure_latency=False, **options)


def task(*models: Any, **options: Any) -> Any:
    return igkd.IGDistillationTask(*models, verbose=False, **options)


NO_MODEL = {
    "compute_maps": (lambda wrong, good, store: igkd.compute_maps(wrong, IMAGES, "out"), "teacher must be a model, "),
    "evaluate": (lambda wrong, good, store: evaluate(wrong), "the model must be a torch module, "),
    "evaluate beside it": (lambda wrong, good, store: evaluate(good, teacher=wrong), "the teacher must be a torch mod"),
    "score_maps": (lambda wrong, good, store: igkd.score_maps(store, wrong, IMAGES), "teacher must be a model, "),
    "export_student": (lambda wrong, good, store: igkd.export_student(wrong, "out"), "the model must be a torch mod"),
    "save_model": (lambda wrong, good, store: igkd.save_model(wrong, "out"), "save_model needs a model from timm.cre"),
    "truncate": (lambda wrong, good, store: igkd.truncate(wrong, 1), "truncate needs a model from timm.create_model"),
    "a task's student": (lambda wrong, good, store: task(wrong, good), "student must be a model, "),
    "a task's teacher": (lambda wrong, good, store: task(good, wrong), "teacher must be a model, "),
}


@pytest.mark.parametrize("argument", ["device", "latency_device"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("gpu", "'gpu' cannot be used here: .*; give cpu"),
        ("cuda:99", "'cuda:99' cannot be used here: .*; give cpu"),
        ("", "'' cannot be used here: .*; give cpu"),
        ("meta", "'meta' holds no values; give cpu"),
        (3.5, "must be a torch device, got float; give a text such as cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(argument, wrong, message, model):
    weights = [weight.clone() for weight in model.parameters()]
    with pytest.raises(UserError, match=rf"^{argument} {message}"):
        evaluate(model, **{argument: wrong})
    assert all(map(torch.equal, model.parameters(), weights))


@pytest.mark.parametrize("wrong", ["resnet18", "local-dir:runs/digits/student", Path("student"), 3, IMAGES], ids=called)
@pytest.mark.parametrize("function", NO_MODEL)
def test_what_is_no_model_is_refused(function, wrong, model, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = NO_MODEL[function]
    with pytest.raises(InputTypeError, match=rf"^{message}.*got {type(wrong).__name__}"):
        call(wrong, model, store)
    assert list(tmp_path.iterdir()) == []


BARE = {
    "compute_maps": (lambda bare, store: igkd.compute_maps(bare, IMAGES, "out"), "pretrained_cfg must say how images"),
    "evaluate": (lambda bare, store: evaluate(bare), "must carry its preprocessing"),
    "score_maps": (lambda bare, store: igkd.score_maps(store, bare, IMAGES), "made by another teacher"),
    "export_student": (lambda bare, store: igkd.export_student(bare, "out"), "must carry its preprocessing"),
    "save_model": (lambda bare, store: igkd.save_model(bare, "out"), "save_model needs a model from timm"),
    "push_student": (lambda bare, store: igkd.push_student(bare, "user/name"), "push_student needs a model from timm"),
    "truncate": (lambda bare, store: igkd.truncate(bare, 1), "truncate needs a model from timm"),
    "a task": (lambda bare, store: task(bare, tiny_teacher()), "pretrained_cfg"),
}


@pytest.mark.parametrize("function", BARE)
@pytest.mark.parametrize("architecture", ["torchvision's", "a layer"])
def test_a_model_that_is_not_timms_is_refused_where_more_is_needed(
    function, architecture, store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    call, message = BARE[function]
    bare = torchvision.models.resnet18(num_classes=2) if architecture == "torchvision's" else torch.nn.Linear(3, 2)
    with pytest.raises(InputError, match=message):
        call(bare.eval(), store)
    assert list(tmp_path.iterdir()) == []


NO_IMAGES = {
    "compute_maps": lambda wrong, model, store: igkd.compute_maps(model, wrong, "out"),
    "evaluate": lambda wrong, model, store: evaluate(model, wrong),
    "score_maps": lambda wrong, model, store: igkd.score_maps(store, model, wrong),
    "export_student calibrated": lambda wrong, model, store: igkd.export_student(
        model, "out", int8=True, calibration=wrong
    ),
    "export_student": lambda wrong, model, store: igkd.export_student(model, "out", evaluation=wrong),
    "IGOverlayDataset": lambda wrong, model, store: igkd.IGOverlayDataset(wrong, store),
    "IGOverlayStream": lambda wrong, model, store: igkd.IGOverlayStream(wrong, store),
}


@pytest.mark.parametrize("wrong", ["images", Path("images"), 3, {"image": 1}, NoLength(), Stream()], ids=called)
@pytest.mark.parametrize("function", NO_IMAGES)
def test_what_is_no_data_set_is_refused(function, wrong, model, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputTypeError, match=rf"got {type(wrong).__name__}|got a {type(wrong).__name__}|is a stream"):
        NO_IMAGES[function](wrong, model, store)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["maps", Path("maps"), 3, IMAGES], ids=called)
def test_what_is_no_store_is_refused_with_how_it_is_opened(wrong, model):
    how = r"MapStore\('maps'\)" if str(wrong) == "maps" else r"MapStore\(folder\)"
    message = rf"must be a MapStore, got {type(wrong).__name__}; open it with {how}$"
    with pytest.raises(InputTypeError, match=f"^maps {message}"):
        igkd.IGOverlayDataset(IMAGES, wrong)
    with pytest.raises(InputTypeError, match=f"^store {message}"):
        igkd.score_maps(wrong, model, IMAGES)


SLIPS = {
    "overlaid images for maps": (
        lambda model, store: igkd.compute_maps(model, igkd.IGOverlayDataset(IMAGES, store), "out"),
        "is overlaid already, by the IGOverlayDataset",
    ),
    "overlaid images to verify": (
        lambda model, store: store.verify(Subset(igkd.IGOverlayDataset(IMAGES, store), [0])),
        "is overlaid already, by the IGOverlayDataset",
    ),
    "overlaid images to score": (
        lambda model, store: igkd.score_maps(store, model, igkd.IGOverlayDataset(IMAGES, store)),
        "is overlaid already, by the IGOverlayDataset",
    ),
    "no folder for maps": (lambda model, store: igkd.compute_maps(model, IMAGES, None), "out must be a path, got None"),
    "a mapping for options": (
        lambda model, store: igkd.compute_maps(model, IMAGES, "out", options={"n_steps": 2}),
        "options must be IGOptions, got dict",
    ),
    "a text for a shard": (
        lambda model, store: igkd.compute_maps(model, IMAGES, "out", shard="0/1"),
        "shard must be two whole numbers, got '0/1'",
    ),
    "no store": (lambda model, store: igkd.MapStore(None), "path must be a path, got NoneType"),
    "a store to push": (lambda model, store: igkd.push_maps(store, "user/x"), "folder must be a path, got MapStore"),
    "no data set": (lambda model, store: igkd.load_labeled_images(None, "train"), "must be a name or a folder, got No"),
    "a number for a split": (
        lambda model, store: igkd.load_labeled_images("digits", 3),
        "split must be a name, got in",
    ),
    "a name for a run": (lambda model, store: igkd.distill("digits"), "RunConfig"),
    "a number for an overlay": (lambda model, store: igkd.IGOverlayDataset(IMAGES, store, 0.2), r"overlay_prob=0\.2"),
    "a text for an overlay": (lambda model, store: igkd.IGOverlayDataset(IMAGES, store, "x"), "must be an IGOverlay"),
    "a text for a probability": (lambda model, store: igkd.IGOverlay("0.1"), "overlay_prob must be a number, got str"),
    "nothing for a probability": (lambda model, store: igkd.IGOverlay(None), "must be a number, got NoneType"),
    "a text for names": (lambda model, store: igkd.save_model(model, "out", "ab"), "label_names must be a list"),
    "numbers for names": (lambda model, store: igkd.save_model(model, "out", [1, 2]), "label_names must be texts"),
    "a mapping for names": (lambda model, store: igkd.save_model(model, "out", {0: "a", 1: "b"}), "must be a list"),
    "a number for names": (lambda model, store: igkd.save_model(model, "out", 2), "label_names must be a list"),
    "no folder to save": (lambda model, store: igkd.save_model(model, None), "folder must be a path, got NoneType"),
    "no folder to export": (lambda model, store: igkd.export_student(model, None), "out must be a path, got NoneType"),
    "a number for a budget": (lambda model, store: igkd.export_student(model, "out", budget=3.0), "must be a Budget"),
    "a path for a name": (lambda model, store: igkd.load_model(Path("x")), "must be a timm name.*local-dir:x"),
    "a model for a name": (lambda model, store: igkd.load_model(model), "must be a timm name, got ResNet"),
    "text for indices": (
        lambda model, store: evaluate(model, class_indices="01"),
        "class_indices of the model must be",
    ),
    "texts for indices": (lambda model, store: evaluate(model, class_indices=["a", "b"]), "must be a number, got str"),
    "a number for indices": (lambda model, store: evaluate(model, class_indices=1), "must be a list of numbers"),
    "text for a batch": (lambda model, store: evaluate(model, batch_size="8"), "batch_size must be a number"),
    "parts of indices": (lambda model, store: evaluate(model, class_indices=[0.2, 1.7]), "a whole number, got 0.2"),
    "part of a batch": (lambda model, store: evaluate(model, batch_size=1.5), "batch_size must be a whole number, got"),
    "a yes for a batch": (lambda model, store: evaluate(model, batch_size=True), "must be a whole number, got bool"),
    "part of a worker": (lambda model, store: evaluate(model, num_workers=0.5), "num_workers must be a whole number"),
    "part of an image": (lambda model, store: evaluate(model, corruptions=2.5), "corruptions must be a whole number"),
    "part of a class": (lambda model, store: igkd.truncate(model, 1, 2.5), "num_classes must be a whole number"),
    "less than no class": (lambda model, store: igkd.truncate(model, 1, -1), "num_classes must be at least 0, got -1"),
    "part of an image to calibrate with": (
        lambda model, store: igkd.export_student(model, "o", int8=True, calibration=IMAGES, calibration_images=1.5),
        "calibration must be a whole number, got 1.5",
    ),
    "parts of a task's indices": (
        lambda model, store: task(model, tiny_teacher(), teacher_class_indices=[0.5, 1]),
        "each of teacher_class_indices must be a whole number, got 0.5",
    ),
    "a list for a loss": (lambda model, store: task(model, loss_type=["kl"]), r"loss_type must be one of .*got \['kl'"),
    "no device for a task": (lambda model, store: task(model, device="gpu"), "device 'gpu' cannot be used here"),
    "a text for an entry": (
        lambda model, store: task(model, tiny_teacher(), attention_loss_weight=1, student_attention_index="a"),
        "student_attention_index must be a number, got str",
    ),
    "part of an entry": (
        lambda model, store: task(model, tiny_teacher(), attention_loss_weight=1, teacher_attention_index=1.5),
        "teacher_attention_index must be a whole number, got 1.5",
    ),
    "no pixels": (
        lambda model, store: task(model, tiny_teacher(), teacher_input_size=(0, 32)),
        "each of teacher_input_size must be at least 1, got 0",
    ),
    "text for a task's indices": (
        lambda model, store: task(model, tiny_teacher(), teacher_class_indices="01"),
        "teacher_class_indices must be a list",
    ),
    "a number for two sides": (
        lambda model, store: task(model, tiny_teacher(), teacher_input_size=32),
        "teacher_input_size must be a list of numbers",
    ),
    "a text for a loss": (lambda model, store: task(model, criterion="ce"), "criterion must be a loss module"),
    "a text for a weight": (lambda model, store: task(model, distill_loss_weight="2"), "must be a number, got str"),
    "a text for a temperature": (lambda model, store: task(model, temperature="2"), "temperature must be a number"),
    "a list for a method": (lambda model, store: igkd.IGOptions(method=["ig"]), "method must be one of"),
    "a text for a tolerance": (lambda model, store: igkd.IGOptions(tolerance="a"), "tolerance must be a number"),
    "a text for steps": (lambda model, store: igkd.score_maps(store, model, IMAGES, steps="3"), "steps must be a num"),
    "a text for a limit": (lambda model, store: igkd.score_maps(store, model, IMAGES, limit="3"), "limit must be a nu"),
    "a text for classes": (lambda model, store: igkd.truncate(model, 1, "3"), "num_classes must be a number"),
    "a number for three": (
        lambda model, store: igkd.load_model("test_resnet", pretrained=False, mean=0.5),
        "--mean must be three numbers",
    ),
    "a text for arguments": (
        lambda model, store: igkd.load_model("test_resnet", pretrained=False, model_args="a=1"),
        "--model-args must be arguments by name, got str",
    ),
    "a number for a checkpoint": (
        lambda model, store: igkd.load_model("test_resnet", checkpoint=3),
        "checkpoint must be a path, got int",
    ),
    "a number for a student": (lambda model, store: igkd.push_student(3, "user/name"), "student must be a folder or"),
    "no repository": (lambda model, store: igkd.push_student(model, None), "--repo-id must be user/name.*got None"),
    "a text for runs": (lambda model, store: igkd.push_student("x", "user/x", seed_runs="ab"), "must be a list of run"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_one_line_of_ours_before_anything_is_written(slip, model, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = SLIPS[slip]
    with pytest.raises(UserError, match=message) as raised:
        call(model, store)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_may_be_numpys_or_torchs(model):
    given = {"batch_size": np.int64(3), "num_workers": np.uint8(0), "class_indices": torch.tensor([1, 0])}
    found, plain = evaluate(model, **given), evaluate(model, batch_size=3, num_workers=0, class_indices=[1, 0])
    assert found.metrics == plain.metrics


def test_names_may_come_from_anything_that_is_gone_through(model, tmp_path):
    igkd.save_model(model, tmp_path / "saved", (name for name in "ab"))
    assert igkd.load_model(f"local-dir:{tmp_path / 'saved'}").pretrained_cfg["label_names"] == ["a", "b"]


def test_a_list_of_pairs_is_a_data_set(model, store):
    assert evaluate(model, list(IMAGES)).metrics["n"] == 4
    assert len(igkd.IGOverlayDataset(list(IMAGES), store)) == 4


def test_a_folder_of_images_may_be_a_path(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        noise_image(1).save(tmp_path / "train" / name / "0.png")
    images = igkd.load_labeled_images(tmp_path, "train")
    assert (len(images), images.name) == (2, str(tmp_path))
