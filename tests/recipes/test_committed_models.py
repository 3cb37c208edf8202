"""The committed teacher and students: loaded as the README says, they give the figures of their files."""

import json

import numpy as np
import pytest
import timm
import torch
from command_lines import RECIPES

from timm_igkd import evaluate, load_labeled_images
from timm_igkd.models.loading import count_parameters

RESULTS = RECIPES / "results"
TEACHER = RESULTS / "teachers" / "convnet_cifar"
STUDENTS = sorted(path.parent for path in RESULTS.glob("students/*/metrics.json"))
FIGURES = {TEACHER: RESULTS / "convnet_cifar_cifar10_test.json"} | {path: path / "metrics.json" for path in STUDENTS}
SAME_POINTS = 0.05  # processors round differently: five of 10,000 answers


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("folder", FIGURES, ids=lambda path: path.name)
def test_committed_model_is_loaded_by_timm_and_has_the_size_that_its_file_names(folder):
    assert count_parameters(load(folder)) == read(FIGURES[folder])["num_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FIGURES, ids=lambda path: path.name)
def test_committed_model_has_the_accuracy_that_its_file_names(folder, shared):
    images = load_labeled_images(str(shared / "data" / "cifar10"), "test")
    found = evaluate(load(folder), images, measure_latency=False, progress=False).metrics
    expected = read(FIGURES[folder])
    assert found["n"] == expected["n"] == 10_000
    assert found["top1"] == pytest.approx(expected["top1"], abs=SAME_POINTS)


@pytest.mark.parametrize("folder", STUDENTS, ids=lambda path: path.name)
def test_committed_student_comes_with_card_and_exports(folder):
    """Its float file answers as the folder does; the card names the accuracy of model and int8 file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(folder / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = load(folder)(images).numpy()
    np.testing.assert_allclose(session.run(None, {"image": images.numpy()})[0], expected, atol=1e-4)
    metrics, card = read(folder / "metrics.json"), (folder / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['top1']:.2f}" in card
    for export in metrics["exports"]:
        assert f"{export['top1']:.2f}" in card
        assert (folder / "export" / export["file"]).stat().st_size == export["size_mb"] * 1e6
