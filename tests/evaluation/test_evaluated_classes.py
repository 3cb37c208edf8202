"""Which output of a model answers for which class of a data set: by numbers, by names, of a part of its classes."""

import copy
import json

import pytest
import torch
from evaluation_parts import QUIET, ShadeReader, Shades
from timm.data import ImageDataset, ImageNetInfo
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch.utils.data import ConcatDataset

from timm_igkd.errors import InputError
from timm_igkd.evaluation.evaluated_model import create_evaluated_model
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.report.run_files import parse_metrics
from timm_igkd.report.tables import result_rows


def test_dataset_classes_map_to_a_subset_of_the_models_outputs():
    model = ShadeReader(num_classes=6, answers=[4, 2])  # shade 0 is output 4, shade 1 output 2
    dataset = Shades([0, 1, 1], classes=["dark", "bright"])
    metrics = evaluate(model, dataset, class_indices=[4, 2], **QUIET).metrics
    assert (metrics["top1"], metrics["top1_subset"]) == (100, 100)
    assert evaluate(model, dataset, class_indices=[2, 4], **QUIET).metrics["top1"] == 0


def test_subset_accuracy_ignores_the_other_outputs():
    model = Distracted(num_classes=6, answers=[4, 2])
    metrics = evaluate(model, Shades([0, 1]), class_indices=[4, 2], **QUIET).metrics
    assert (metrics["top1"], metrics["top1_subset"]) == (0, 100)


def test_names_of_model_and_dataset_decide_where_both_say_theirs(two_named):
    model, images = two_named
    images.classes = ("dog", "cat")
    swapped = evaluate(model, images, **QUIET)
    images.labels = [1 - label for label in images.labels]
    images.classes = ("cat", "dog")
    assert evaluate(model, images, **QUIET).metrics["top1"] == swapped.metrics["top1"]
    images.classes = ("cat", "bird")
    with pytest.raises(InputError, match="'bird' is not among them"):
        evaluate(model, images, **QUIET)


def test_imagenets_names_decide_too_though_no_model_says_them():
    """As for the command: a model of 1,000 outputs has ImageNet's WordNet ids."""
    model = tiny_teacher(size=16, classes=1000).eval()
    ids = ImageNetInfo("imagenet-1k").label_names()
    images = ImageList([noise_image(seed) for seed in range(5)], [0, 1, 2, 1, 0])
    images.classes = [ids[number] for number in (7, 3, 900)]
    found = create_evaluated_model("model", model, None, images)
    assert found.class_indices.tolist() == [7, 3, 900]
    images.classes = ids[::-1]
    images.labels = [999 - label for label in images.labels]
    turned = evaluate(model, images, **QUIET)
    images.classes, images.labels = ids, [999 - label for label in images.labels]
    assert evaluate(model, images, **QUIET).metrics["loss"] == pytest.approx(turned.metrics["loss"])


@pytest.fixture
def two_named():
    """Return a model that names its two outputs, and images of which it has some right."""
    model = tiny_teacher(size=16)
    model.pretrained_cfg["label_names"] = ["cat", "dog"]
    return model, ImageList([noise_image(seed) for seed in range(7)], [0, 0, 0, 0, 0, 1, 1])


def test_parts_that_number_other_classes_are_refused(two_named):
    model, images = two_named
    other = copy.copy(images)
    images.classes, other.classes = ("cat", "dog"), ("dog", "cat")
    with pytest.raises(
        InputError, match="a part of the ConcatDataset has classes cat, dog, another dog, cat; give all"
    ):
        evaluate(model, ConcatDataset([images, other]), **QUIET)


def named(names, order):
    """Return a network of five classes, its outputs in an order of their own, by their names."""
    model = tiny_teacher(size=16, classes=5).eval()
    model.fc.weight.data, model.fc.bias.data = model.fc.weight.data[order], model.fc.bias.data[order]
    model.pretrained_cfg["label_names"] = [names[i] for i in order]
    return model


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [0, 1, 2, 3, 4]])
def test_the_order_of_the_teachers_outputs_changes_nothing(order):
    """Where the data set lacks some of the classes that both know."""
    student, teacher = named("abcde", [0, 1, 2, 3, 4]), named("abcde", order)
    images = ImageList([noise_image(seed) for seed in range(9)], [0, 1, 2] * 3)
    images.classes = ["b", "d", "e"]
    alone = evaluate(student, images, **QUIET).metrics
    found = evaluate(student, images, teacher=teacher, **QUIET).metrics
    same = ("top1", "top5", "loss", "ece", "top1_subset")
    assert {name: found[name] for name in same} == {name: alone[name] for name in same}
    assert {name: found["teacher"][name] for name in same} == pytest.approx({name: alone[name] for name in same})
    assert found["agreement"] == 100
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-9)
    assert "top1_all_classes" not in found


def test_two_orders_of_classes_and_a_data_set_without_names_are_refused():
    images = ImageList([noise_image(seed) for seed in range(3)], [0, 1, 2])
    student, teacher = named("abcde", [0, 1, 2, 3, 4]), named("abcde", [0, 3, 2, 1, 4])
    with pytest.raises(InputError, match=r"output 1 is 'b' of the model and 'd' of the teacher.*give class_indices"):
        evaluate(student, images, teacher=teacher, **QUIET)
    both = {"class_indices": range(5), "teacher_class_indices": [0, 3, 2, 1, 4]}
    assert evaluate(student, images, teacher=teacher, **both, **QUIET).metrics["agreement"] == 100


@pytest.mark.parametrize("names", ["aabcd", "abcde"])
def test_the_reverse_of_a_teachers_outputs_is_refused_whatever_their_names(names):
    images = ImageList([noise_image(seed) for seed in range(3)], [0, 1, 2])
    student, teacher = named(names, [0, 1, 2, 3, 4]), named(names, [4, 3, 2, 1, 0])
    with pytest.raises(InputError, match="the dataset names no class"):
        evaluate(student, images, teacher=teacher, **QUIET)


def test_names_that_are_no_texts_and_networks_without_num_classes_are_evaluated():
    images = ImageList([noise_image(seed) for seed in range(3)], [0, 1, 2])
    student, teacher = (named("abcde", [0, 1, 2, 3, 4]) for _ in range(2))
    for names in (list(range(5)), [None, *"abcd"]):
        student.pretrained_cfg["label_names"] = teacher.pretrained_cfg["label_names"] = names
        assert evaluate(student, images, teacher=teacher, **QUIET).metrics["agreement"] == 100
    del student.num_classes, teacher.num_classes
    assert evaluate(student, images, teacher=teacher, **QUIET).metrics["agreement"] == 100


def test_labels_of_a_class_map_are_outputs_of_both(tmp_path):
    """timm's, with gaps: it was held against the names of each."""
    for number, name in enumerate("ac"):
        (tmp_path / name).mkdir()
        noise_image(number).save(tmp_path / name / "0.png")
    images = ImageDataset(str(tmp_path), class_map={"a": 0, "c": 2})
    student, teacher = named("abcde", [0, 1, 2, 3, 4]), named("abcde", [0, 3, 2, 1, 4])
    found = evaluate(student, images, teacher=teacher, **QUIET).metrics
    assert (found["agreement"], found["top1"]) == (100, evaluate(student, images, **QUIET).metrics["top1"])


def test_indices_that_contradict_the_names_decide():
    images = ImageList([noise_image(seed) for seed in range(6)], [0, 1] * 3)
    both = {"class_indices": [0, 1], "teacher_class_indices": [1, 0]}
    student, teacher = named("abcde", [0, 1, 2, 3, 4]), named("abcde", [0, 1, 2, 3, 4])
    assert "top1_all_classes" in evaluate(student, images, teacher=teacher, **both, **QUIET).metrics


def test_student_and_teacher_of_other_outputs_agree_over_the_datasets_classes():
    teacher = ShadeReader(num_classes=6, answers=[4, 2])
    student = ShadeReader(num_classes=2)
    metrics = evaluate(student, Shades([0, 1]), teacher=teacher, teacher_class_indices=[4, 2], **QUIET).metrics
    assert metrics["agreement"] == 100
    assert "top1_subset" in metrics["teacher"]
    assert "top1_subset" not in metrics


class Distracted(ShadeReader):
    """Knows six classes, and would always answer with one that the dataset does not have."""

    def forward(self, x):
        return super().forward(x) + 1e6 * torch.eye(6)[0]


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_a_model_of_more_classes_is_asked_for_those_of_both(larger):
    """Or the other one, of equal answers to the question both are asked, would win by what it does not know."""
    small, large = ShadeReader(num_classes=2), Distracted(num_classes=6, answers=[4, 2])
    shades, indices = Shades([0, 1, 1]), {"class_indices" if larger == "student" else "teacher_class_indices": [4, 2]}
    models = (small, large) if larger == "teacher" else (large, small)
    options = QUIET | {"corruptions": 2}
    metrics = evaluate(models[0], shades, teacher=models[1], **indices, **options).metrics
    of_large, of_small = (metrics["teacher"], metrics) if larger == "teacher" else (metrics, metrics["teacher"])
    for name in ("top1", "top5", "loss", "ece"):
        assert of_large[name] == pytest.approx(of_small[name], abs=1e-6), name
    assert of_large["robustness"] == of_small["robustness"]
    assert (of_large["top1"], of_large["top1_all_classes"]) == (100, 0)
    assert "top1_all_classes" not in of_small
    rows = {row.name: row for row in result_rows(parse_metrics(json.loads(json.dumps(metrics)), "m"))}
    shown = rows["… asked for one of all classes that it knows"]
    assert shown.teacher.startswith("0.0") if larger == "teacher" else shown.student.startswith("0.0")
    assert rows["Top-1 accuracy"].comparison == "equal"
    assert "Top-5 accuracy" not in rows  # of two classes


def test_two_models_of_the_same_more_classes_are_asked_for_all():
    large = Distracted(num_classes=6, answers=[4, 2])
    both = {"class_indices": [4, 2], "teacher_class_indices": [4, 2]}
    metrics = evaluate(large, Shades([0, 1]), teacher=large, **both, **QUIET).metrics
    assert [m["top1"] for m in (metrics, metrics["teacher"])] == [0, 0]
    assert "top1_all_classes" not in metrics
