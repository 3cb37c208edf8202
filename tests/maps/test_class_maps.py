"""timm's class_map files give classes labels of their own: the right output of the teacher is attributed, or none."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.options import IGOptions
from timm_igkd.data.items import class_map, class_names, read_item
from timm_igkd.errors import InputError
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.maps.build import compute_maps

TWO_STEPS = IGOptions(n_steps=2)


@pytest.fixture
def mapped(tmp_path):
    """Return a function that opens two images of each class, in folders of its name, with a class map."""

    def open_folder(labels: dict[str, int]) -> Any:
        for number, name in enumerate(labels):
            for index in range(2):
                path = tmp_path / "images" / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise_image(10 * number + index).save(path)
        (tmp_path / "map.pkl").write_bytes(pickle.dumps(labels))
        return timm.data.create_dataset("folder/", str(tmp_path / "images"), class_map=str(tmp_path / "map.pkl"))

    return open_folder


def teacher_of(classes: int, names: list[str] | None = None) -> Any:
    teacher = tiny_teacher(classes=classes, size=16)
    if names is not None:
        teacher.pretrained_cfg["label_names"] = names
    return teacher


def build(teacher: Any, dataset: Any, folder: Path) -> Any:
    return compute_maps(teacher, dataset, folder, options=TWO_STEPS, logits=True, progress=False)


SYNSETS = ImageNetInfo().label_names()
IMAGENET = {"n01440764": SYNSETS.index("n01440764"), "n03445777": SYNSETS.index("n03445777")}
# labels, outputs of the teacher, their names: the labels are the teacher's outputs
RIGHT: dict[str, tuple[dict[str, int], int, list[str] | None]] = {
    "ImageNet's indices": (IMAGENET, 1000, None),
    "gaps, outputs without names": ({"a": 0, "c": 2}, 3, None),
    "gaps, outputs of these names": ({"a": 0, "c": 2}, 3, ["a", "b", "c"]),
    "from 1 on, outputs without names": ({"a": 1, "b": 2}, 3, None),
    "merged, outputs without names": ({"a": 0, "b": 0, "c": 1}, 2, None),
}
WRONG: dict[str, tuple[dict[str, int], int, list[str] | None, str]] = {
    "merged, outputs apart": (
        {"a": 0, "b": 0, "c": 1}, 3, ["b", "c", "a"], "gives class 'a' label 0, which is output 2 of the model",
    ),
    "merged, one output missing": (
        {"a": 0, "b": 0, "c": 1}, 2, ["a", "c"], "gives class 'b' label 0, which is none of the outputs of the model",
    ),
    "gaps, other order": ({"a": 0, "c": 2}, 3, ["c", "b", "a"], "gives class 'a' label 0, which is output 2"),
    "gaps, too many outputs": ({"a": 0, "c": 2}, 5, None, "labels go up to 2, expected 4 for the 5 outputs"),
    "from 1 on, outputs of these names": ({"a": 1, "b": 2}, 2, ["a", "b"], "'a' label 1, which is output 0"),
    "from 1 on, too few outputs": ({"a": 1, "b": 2}, 2, None, "labels go up to 2, expected 1 for the 2 outputs"),
    "ImageNet's indices, another order": ({name: 999 - i for name, i in IMAGENET.items()}, 1000, None, "is output 0 "),
    "names of nobody": ({"a": 0, "c": 2}, 3, ["x", "y", "z"], "'a' label 0, which is none of the outputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_labels_that_are_the_teachers_outputs_are_attributed(mapped, tmp_path, name):
    labels, classes, names = RIGHT[name]
    dataset, teacher = mapped(labels), teacher_of(classes, names)
    assert class_map(dataset) == labels
    assert class_names(dataset) is None
    store = build(teacher, dataset, tmp_path / "maps")
    store.verify(dataset)
    items = [read_item(dataset, index) for index in range(len(dataset))]
    assert {label for _, label in items} == set(labels.values())
    plain = ImageList([image for image, _ in items], [label for _, label in items])
    teacher.pretrained_cfg.pop("label_names", None)
    direct = build(teacher, plain, tmp_path / "direct")
    for row in range(len(dataset)):
        assert np.array_equal(store.levels(row), direct.levels(row))
        assert np.array_equal(store.logits(row), direct.logits(row))
        assert len(store.logits(row)) == classes


@pytest.mark.parametrize("name", RIGHT)
def test_model_is_evaluated_by_labels_that_are_its_outputs(mapped, name):
    labels, classes, names = RIGHT[name]
    dataset, model = mapped(labels), teacher_of(classes, names)
    result = evaluate(model, dataset, measure_latency=False)
    right = (result.logits.argmax(1) == torch.tensor([read_item(dataset, i)[1] for i in range(len(dataset))])).double()
    assert result.metrics["top1"] == pytest.approx(100 * right.mean())


@pytest.mark.parametrize("name", WRONG)
def test_labels_of_other_outputs_are_refused_for_that_reason(mapped, tmp_path, name):
    labels, classes, names, message = WRONG[name]
    dataset, teacher = mapped(labels), teacher_of(classes, names)
    with pytest.raises(InputError, match=message):
        build(teacher, dataset, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()
    with pytest.raises(InputError, match=message):
        evaluate(teacher, dataset, measure_latency=False)


def test_class_map_that_counts_classes_once_goes_by_name(mapped, tmp_path):
    dataset = mapped({"a": 1, "b": 0})
    assert class_map(dataset) is None
    assert class_names(dataset) == ("b", "a")
    store = build(teacher_of(3, ["a", "b", "c"]), dataset, tmp_path / "maps")
    assert store.provenance.teacher.class_indices == (1, 0)


@pytest.mark.parametrize("target", ["label", "predicted"])
def test_labels_without_names_may_lack_the_last_outputs(target, tmp_path):
    """As in `evaluate`: a slice, or a small split, of numbers."""
    images = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 1, 0])
    images.num_classes = 2
    options = IGOptions(n_steps=2, target=target)
    store = compute_maps(teacher_of(5), images, tmp_path / "maps", options=options, logits=True, progress=False)
    assert store.provenance.teacher.class_indices is None
    assert store.provenance.num_logits == 5


def test_labels_without_names_beyond_the_outputs_are_refused(tmp_path):
    images = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 5, 0])
    images.num_classes = 6
    with pytest.raises(InputError, match="the model has 5 classes, the dataset has 6"):
        build(teacher_of(5), images, tmp_path / "maps")
