"""An export takes classes by name, and what cannot be exported is told in one line."""

import datasets
import pytest
import timm
import torch
from export_parts import smallest
from PIL import Image

from timm_igkd import export_student, load_labeled_images
from timm_igkd.errors import InputError, RunError

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.usefixtures("quick_timing"), pytest.mark.filterwarnings("ignore")]  # of torch's exporter

CLASSES = ("ant", "bee", "cat")


def coloured(folder, split, names):
    """Write images of one colour a class: those of ant are red, of bee green, of cat blue."""
    colours = dict(zip(CLASSES, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], strict=True))
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [Image.new("RGB", (32, 32), colours[name]) for name in names]
    rows = datasets.Dataset.from_dict({"image": images, "label": list(range(3))}, features=kinds)
    rows.to_parquet(f"{folder}/{split}.parquet")


class ByColour(torch.nn.Module):
    """Answers with the strongest colour, and does not name its outputs."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        self.pretrained_cfg = {"input_size": (3, 32, 32), "architecture": "by_colour", **statistics}
        self.weight = torch.nn.Parameter(torch.eye(3))

    def forward(self, images):
        return images.mean((2, 3)) @ self.weight


@pytest.mark.parametrize("order", [CLASSES, ("cat", "ant", "bee")])
def test_images_of_a_split_that_counts_its_classes_otherwise_are_judged_by_name(order, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    coloured(images, "train", CLASSES)
    coloured(images, "test", order)
    train, test = (load_labeled_images(str(images), split) for split in ("train", "test"))
    record = export_student(ByColour(), tmp_path / "out", calibration=train, evaluation=test, progress=False)
    assert (record.pytorch_top1, record.exports[0].top1) == (100, 100)
    assert record.metadata.class_names == CLASSES
    if order != CLASSES:
        parts = torch.utils.data.ConcatDataset([test])  # labels that cannot be counted anew
        with pytest.raises(InputError, match=r"class 'cat' is label 0 of .* and number 2 of the calibration's images"):
            export_student(ByColour(), tmp_path / "out", calibration=train, evaluation=parts, progress=False)


def test_other_numbers_than_float32_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"is torch\.float16; call model\.float\(\)"):
        export_student(smallest().half(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_gray_models_are_refused_for_what_they_are(tmp_path):
    with pytest.raises(InputError, match="the model must read colour images, 3 channels, got one of 1"):
        export_student(timm.create_model("test_resnet", in_chans=1, num_classes=2), tmp_path / "out", progress=False)


def test_what_torch_cannot_export_is_told_by_its_cause_in_one_colour(tmp_path):
    class Odd(ByColour):
        def forward(self, images):
            return super().forward(images if images.sum() > 0 else -images)

    with pytest.raises(RunError) as found:
        export_student(Odd(), tmp_path / "out", progress=False)
    assert "\x1b" not in str(found.value)
    assert "This is step" not in str(found.value)
    assert "data-dependent" in str(found.value)


def test_file_that_onnxruntime_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise ValueError("no kernel")

    monkeypatch.setattr("timm_igkd.evaluation.onnx_file.open_session", refuse)
    with pytest.raises(RunError, match="onnxruntime does not run the exported file: no kernel"):
        export_student(smallest(), tmp_path / "out", progress=False)


def test_an_export_among_the_images_is_refused(tiny_images):
    images = tiny_images("folder", classes=3, n=6) / "train"
    found = load_labeled_images(str(images), "train")
    with pytest.raises(InputError, match=r"lies among the images of .*; give another folder"):
        export_student(ByColour(), images / "export", calibration=found, progress=False)
    assert not (images / "export").exists()


def test_names_that_two_outputs_share_have_their_number_in_the_file(tmp_path):
    """As ImageNet's words have crane twice."""
    model = smallest()
    model.pretrained_cfg["label_names"] = ["crane", "crane", *"abcdefgh"]
    record = export_student(model, tmp_path / "out", progress=False)
    assert record.metadata.class_names == ("crane (0)", "crane (1)", *"abcdefgh")
    model.pretrained_cfg["label_names"] = ["crane", "crane", "crane (1)", *"abcdefg"]  # none has another way out
    assert export_student(model, tmp_path / "out", progress=False).metadata.class_names is None
