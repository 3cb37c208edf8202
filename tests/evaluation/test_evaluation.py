"""Numbers of models whose answers are known by construction."""

import json
import math
import random

import numpy as np
import pytest
import timm
import torch
from evaluation_parts import QUIET, ShadeReader, Shades

from timm_igkd.errors import InputError, InputTypeError, RunError
from timm_igkd.evaluation.calibration import reliability_bins
from timm_igkd.evaluation.evaluated_model import create_evaluated_model, indices_for
from timm_igkd.evaluation.latency import time_model, time_models
from timm_igkd.evaluation.metrics import classification_metrics, evaluate, write_metrics
from timm_igkd.report.run_files import read_predictions, write_predictions


def test_perfect_model_has_top1_100_and_ece_0():
    result = evaluate(ShadeReader(sharpness=1000), Shades([0, 1, 2, 3, 3]), **QUIET)
    metrics = result.metrics
    assert (metrics["top1"], metrics["top5"], metrics["n"]) == (100, 100, 5)
    assert metrics["ece"] == pytest.approx(0, abs=1e-6)
    assert metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert (metrics["dataset"], metrics["split"]) == ("shades", "test")
    assert result.logits.shape == (5, 4)
    assert result.labels.tolist() == [0, 1, 2, 3, 3]


def test_ece_of_a_known_construction():
    # bin (0.8, 0.867]: confidence 0.85, one of two is right; bin (0.533, 0.6]: confidence 0.59, both are right
    probabilities = np.array([[0.85, 0.15], [0.85, 0.15], [0.41, 0.59], [0.41, 0.59]])
    expected = 0.5 * abs(0.85 - 0.5) + 0.5 * abs(0.59 - 1.0)
    bins = reliability_bins(torch.tensor(probabilities), torch.tensor([0, 1, 1, 1]))
    assert bins.expected_calibration_error == pytest.approx(expected)
    assert bins.counts.sum() == 4
    assert np.flatnonzero(bins.counts).tolist() == [8, 12]
    assert math.isnan(bins.accuracy[0])


def test_full_confidence_falls_into_the_last_bin():
    assert reliability_bins(np.eye(3), [0, 1, 1]).counts[-1] == 3


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    assert reliability_bins([[0.5, 0.5], [0.75, 0.25]], [0, 0], bins=4).counts.tolist() == [0, 1, 1, 0]


def test_agreement_with_itself_is_100_and_kl_0():
    model = ShadeReader(answers=[1, 0, 2, 3])
    metrics = evaluate(model, Shades([0, 1, 2]), teacher=model, **QUIET).metrics
    assert metrics["agreement"] == 100
    assert metrics["teacher_kl"] == 0
    assert metrics["compression"] == 1
    own = {
        key: value for key, value in metrics.items() if key not in ("teacher", "agreement", "teacher_kl", "compression")
    }
    assert metrics["teacher"] == own


def test_kl_is_from_teacher_to_student():
    student, teacher = ShadeReader(sharpness=0.1), ShadeReader(sharpness=0.5)
    result = evaluate(student, Shades([0, 1, 2]), teacher=teacher, **QUIET)
    p, log_q = result.teacher_logits.double().softmax(1), result.logits.double().log_softmax(1)
    expected = (p * (p.log() - log_q)).sum(1).mean().item()
    assert result.metrics["teacher_kl"] == pytest.approx(expected)
    assert expected > 0.01


def test_each_model_sees_its_own_normalisation():
    student, teacher = ShadeReader(mean=0.5, std=0.25), ShadeReader()
    metrics = evaluate(student, Shades([0, 1, 2, 3]), teacher=teacher, **QUIET).metrics
    assert (metrics["top1"], metrics["teacher"]["top1"]) == (100, 100)


def test_student_and_teacher_are_timed_in_turn(monkeypatch):
    order = []
    models = [ShadeReader(), ShadeReader()]
    for name, model in zip("st", models, strict=True):
        model.register_forward_hook(lambda *args, name=name: order.append(name))
    found = time_models([model.eval() for model in models], [(3, 8, 8)] * 2, torch.device("cpu"), seconds=0)
    assert order == ["s", "t"] * (len(order) // 2)
    assert [result["batch_64"]["n"] for result in found] == [5, 5]


def test_equal_logits_are_ranked_by_class():
    metrics = evaluate(ShadeReader(num_classes=8, sharpness=0), Shades(range(8)), **QUIET).metrics
    assert metrics["top1"] == 100 / 8
    assert metrics["top5"] == 100 * 5 / 8


def test_models_keep_their_mode():
    model = ShadeReader()
    model.frozen = torch.nn.BatchNorm2d(3).eval()
    model.train()
    model.frozen.eval()
    evaluate(model, Shades([0]), **QUIET)
    assert model.training
    assert not model.frozen.training


def test_a_timm_model_is_measured_with_latency(tmp_path):
    model = timm.create_model(
        "test_vit", num_classes=3, img_size=32, pretrained_cfg_overlay={"input_size": (3, 32, 32)}
    )
    result = evaluate(model, Shades([0, 1, 2, 1]), batch_size=3, progress=False)
    metrics = result.metrics
    assert metrics["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["macs"] > 0
    assert metrics["size_mb"] == pytest.approx(4e-6 * metrics["num_parameters"], rel=0.01)
    assert set(metrics["latency_ms"]) == {"batch_1", "batch_64"}
    assert metrics["latency_ms"]["batch_1"]["p90"] >= metrics["latency_ms"]["batch_1"]["median"] > 0
    write_metrics(tmp_path / "new" / "metrics.json", metrics)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics


def test_latency_repeats_at_least_five_times():
    times = time_model(ShadeReader().eval(), (3, 8, 8), torch.device("cpu"), seconds=0)
    assert [entry["n"] for entry in times.values()] == [5, 5]


def test_worker_processes_give_the_same_logits():
    alone = evaluate(ShadeReader(), Shades([0, 1, 2]), **QUIET)
    helped = evaluate(ShadeReader(), Shades([0, 1, 2]), num_workers=1, **QUIET)
    assert torch.equal(alone.logits, helped.logits)


@pytest.mark.parametrize("kind", ["dict", "tuple", "map", "classes"])
def test_a_model_that_answers_with_no_logits_is_told_what_they_are(kind):
    model = ShadeReader()
    answer = {
        "dict": lambda logits: {"logits": logits},
        "tuple": lambda logits: (logits, logits),
        "map": lambda logits: logits[:, :, None, None],
        "classes": lambda logits: logits.argmax(1),
    }[kind]
    model.register_forward_hook(lambda module, args, logits: answer(logits))
    with pytest.raises(InputTypeError, match=r"the model must return .*logits.*; wrap it so that it does"):
        evaluate(model, Shades([0]), **QUIET)


def test_a_name_is_no_model():
    with pytest.raises(InputTypeError, match="the model must be a torch module, got str; load it with load_model"):
        evaluate("local-dir:student", Shades([0]), **QUIET)


def test_empty_dataset_is_refused():
    with pytest.raises(InputError, match="no image"):
        evaluate(ShadeReader(), Shades([]), **QUIET)


@pytest.mark.parametrize("label", [4, -1])
def test_label_outside_the_classes_is_refused(label):
    with pytest.raises(InputError, match=rf"label of image 1 must be in 0\.\.3, .*got {label}"):
        evaluate(ShadeReader(), Shades([0, label]), **QUIET)


def test_model_of_other_classes_is_refused():
    with pytest.raises(InputError, match="model has 4 classes and the dataset 2"):
        evaluate(ShadeReader(), Shades([0, 1], classes=["dark", "bright"]), **QUIET)


def test_teacher_of_other_classes_is_refused():
    with pytest.raises(InputError, match="must share their classes, found 6 and 4"):
        evaluate(ShadeReader(), Shades([0, 1]), teacher=ShadeReader(6), **QUIET)


def test_non_finite_logits_are_an_error_that_names_the_image():
    with pytest.raises(RunError, match="teacher gives non-finite logits for image 0"):
        evaluate(ShadeReader(), Shades([0, 1]), teacher=ShadeReader(sharpness=math.nan), **QUIET)


def test_model_without_preprocessing_is_refused():
    with pytest.raises(InputError, match="no pretrained_cfg"):
        evaluate(torch.nn.Linear(3, 3), Shades([0]), **QUIET)


def test_metrics_file_is_strict_json(tmp_path):
    with pytest.raises(RunError, match="NaN"):
        write_metrics(tmp_path / "metrics.json", {"top1": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_predictions_come_back_over_the_datasets_classes(tmp_path):
    teacher = ShadeReader(num_classes=6, answers=[4, 2])
    result = evaluate(ShadeReader(2), Shades([0, 1]), teacher=teacher, teacher_class_indices=[4, 2], **QUIET)
    write_predictions(tmp_path / "p.npz", result, ["dark", "bright"], teacher_class_indices=[4, 2])
    found = read_predictions(tmp_path / "p.npz")
    assert found.class_names == ["dark", "bright"]
    assert np.array_equal(found.teacher_logits, result.teacher_logits.numpy()[:, [4, 2]])
    assert np.array_equal(found.student_logits, result.logits.numpy())


def test_metrics_of_known_logits():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    metrics = classification_metrics(probabilities.log(), torch.tensor([0, 1, 2, 2]))
    assert metrics["top1"] == 75
    assert metrics["top5"] == 100
    assert metrics["loss"] == pytest.approx(-(3 * math.log(0.5) + math.log(0.2)) / 4)
    assert metrics["ece"] == pytest.approx(0.75 - 0.5)


def test_evaluate_gives_the_metrics_of_its_logits():
    result = evaluate(ShadeReader(sharpness=0.1, answers=[1, 0, 2, 3]), Shades([0, 1, 2]), **QUIET)
    expected = classification_metrics(result.logits, result.labels)
    assert {key: result.metrics[key] for key in expected} == expected


def test_model_of_grey_images_is_refused():
    model = timm.create_model("test_resnet", in_chans=1, num_classes=2)
    with pytest.raises(InputError, match="the student must read colour images, 3 channels, got one of 1"):
        create_evaluated_model("student", model, None, [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("corruptions", [0, 2])
def test_models_of_any_precision_are_measured_in_it(dtype, corruptions):
    images = Shades([0, 1, 2, 3])
    model = ShadeReader(sharpness=10)
    options = QUIET | {"corruptions": corruptions}
    expected = evaluate(model, images, **options)
    found = evaluate(model.to(dtype), images, **options)
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.1)
    assert found.metrics["top1"] == expected.metrics["top1"]


def test_a_split_without_names_may_lack_the_last_classes():
    class Unnamed:
        num_classes = 2

        def __len__(self):
            return 3

    model = timm.create_model("test_resnet", num_classes=3)
    assert indices_for(model, Unnamed()) is None
    model.pretrained_cfg["label_names"] = ["a", "b", "c"]
    with pytest.raises(InputError, match="the model has 3 classes, the dataset has 2"):
        indices_for(model, Unnamed())
    with pytest.raises(InputError, match="the model has 1000 classes, the dataset has 2"):
        indices_for(timm.create_model("test_resnet", num_classes=1000), Unnamed())


def test_a_model_without_a_classifier_is_refused():
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(InputError, match="the model has no classifier, its outputs are features"):
        evaluate(model, Shades([0, 1]), **QUIET)


def test_evaluation_draws_nothing_from_the_hosts_generators():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(ShadeReader(sharpness=10), Shades([0, 1, 2, 3]), **QUIET | {"corruptions": 2})
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
