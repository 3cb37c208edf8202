"""Which images calibrate, choose and verify an exported file."""

from dataclasses import asdict

import numpy as np
import pytest
from command_lines import two_splits
from export_parts import smallest

from timm_igkd import export_student, load_labeled_images
from timm_igkd.data.labels import evenly_spread
from timm_igkd.errors import InputError
from timm_igkd.export import int8 as int8_module
from timm_igkd.export import student as student_module
from timm_igkd.export.int8 import spread_indices
from timm_igkd.export.student import check_calibration

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.usefixtures("quick_timing"), pytest.mark.filterwarnings("ignore")]  # of torch's exporter


def test_calibration_and_comparison_share_no_image():
    fit, compare, verify = spread_indices(100, 20)
    assert (len(fit), len(compare), set(fit) & set(compare)) == (20, 20, set())
    assert (fit, compare[:3]) == (list(range(0, 100, 5)), [1, 6, 11])
    assert sorted([*fit, *compare, *verify]) == list(range(100))
    assert spread_indices(7, 256) == ([0, 3], [1, 4], [2, 5, 6])
    assert spread_indices(5, 256) == ([0], [1], [2, 3, 4])
    assert spread_indices(2, 256) == ([0], [1], [])
    with pytest.raises(InputError, match="has 1 images, expected at least two"):
        spread_indices(1, 256)


@pytest.mark.parametrize("total", [3, 511, 512, 513, 767, 768, 770])
def test_a_third_of_the_images_is_left_to_verify(total):
    fit, compare, verify = spread_indices(total, 256)
    assert len(fit) == len(compare) == min(256, total // 3)
    assert len(verify) == total - 2 * len(fit) >= total / 3
    assert sorted([*fit, *compare, *verify]) == list(range(total))


@pytest.mark.parametrize("classes", [2, 10])
def test_images_whose_classes_lie_in_turn_are_chosen_of_every_class(classes):
    labels = np.arange(5120) % classes
    for chosen in spread_indices(5120, 256, labels):
        assert len(np.unique(labels[chosen])) == classes
    drawn = np.random.default_rng(0).permutation(labels)
    assert spread_indices(5120, 256, drawn) == spread_indices(5120, 256)


@pytest.mark.parametrize(
    ("total", "classes", "count", "least"),
    [(10_000, 100, 50, 30), (10_000, 100, 100, 60), (10_000, 100, 200, 80), (10_000, 100, 400, 95), (1000, 10, 40, 10)],
)
def test_few_images_of_classes_that_lie_in_turn_are_of_many_classes(total, classes, count, least):
    """Of 100 in turn, the first of 100 equal stretches are all of one class."""
    labels = np.arange(total) % classes
    assert len(np.unique(labels[evenly_spread(total, count, labels)])) >= least


@pytest.mark.parametrize(("total", "classes"), [(10_000, 10), (1_797, 10), (10_000, 100)])
def test_sorted_and_shuffled_images_keep_their_choice(total, classes):
    """Chance, too, gives one choice of few images fewer classes than another."""
    labels, changed = np.arange(total) % classes, 0
    for count in (1, 2, 4, 8, 10, 16, 24, 32, 64, 200):
        orders = [np.sort(labels), *(np.random.default_rng(seed).permutation(labels) for seed in range(20))]
        found = [evenly_spread(total, count, order) != evenly_spread(total, count) for order in orders]
        assert not found[0]
        changed += sum(found)
    assert changed <= 2  # of 200


def test_calibrating_on_the_images_that_measure_accuracy_is_refused(tmp_path, tiny_images):
    folder = str(two_splits(tiny_images))
    test = load_labeled_images(folder, "test")
    others = [load_labeled_images(folder, split) for split in ("test", "test[:50%]", "all", "train+test")]
    for images in (test, *others, test.subset(range(4))):
        with pytest.raises(InputError, match="name the training split to calibrate with"):
            export_student(smallest(), tmp_path / "out", int8=True, calibration=images, evaluation=test)
    assert not (tmp_path / "out").exists()
    check_calibration(load_labeled_images(folder, "train"), test)
    check_calibration(test.subset(range(4)), test.subset(range(4, 8)))


def test_images_without_labels_calibrate_and_verify(tmp_path):
    digits = load_labeled_images("digits", "train").subset(range(24)).without_labels()
    record = export_student(
        smallest(), tmp_path / "out", int8=True, calibration=digits, calibration_images=8, progress=False
    )
    assert (record.verified_on.n, record.pytorch_top1) == (8, None)


def test_without_images_noise_is_compared_and_no_accuracy_told(tmp_path):
    record = export_student(smallest(), tmp_path / "out", progress=False)
    assert asdict(record.verified_on) == {"n": 64, "dataset": None, "split": None}
    (file,) = record.exports
    assert (file.top1, file.drop, file.passed, record.recommended) == (None, None, True, "onnx")


def test_without_a_test_split_a_float_file_is_compared_on_all_images(tmp_path):
    digits = load_labeled_images("digits", "train").subset(range(10))
    record = export_student(smallest(), tmp_path / "out", calibration=digits, calibration_images=4, progress=False)
    assert asdict(record.verified_on) == {"n": 10, "dataset": "digits", "split": "train"}  # nothing is calibrated
    assert record.pytorch_top1 is None


@pytest.mark.parametrize(("n", "calibrating", "verifying"), [(24, 8, 8), (40, 8, 24), (16, 5, 6), (2, 1, 1)])
def test_without_a_test_split_an_int8_file_is_compared_on_images_that_made_nothing_of_it(
    tmp_path, monkeypatch, n, calibrating, verifying
):
    """Of two none is left beside the one that calibrates and the one that chooses; this verifies, then."""
    digits = load_labeled_images("digits", "train").subset(range(n))
    used = []
    for module, name, images in ((int8_module, "FedBatches", 1), (student_module, "verify_files", 2)):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, r=real, i=images, **more: (used.append(given[i].indices), r(*given, **more))[1]
        )
    export_student(smallest(), tmp_path / "out", int8=True, calibration=digits, calibration_images=8, progress=False)
    calibrated, compared, verified = map(set, used)
    assert (len(calibrated), len(compared), len(verified)) == (calibrating, calibrating, verifying)
    assert not calibrated & (compared | verified)
    assert not compared & verified or n == 2
