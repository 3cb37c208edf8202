"""Accuracy on corrupted images: on demand, before the transform, of a part that is spread over the data."""

import json

import numpy as np
import pytest
import timm
import torch
from evaluation_parts import QUIET, ShadeReader, Shades
from PIL import Image
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.cli import commands
from timm_igkd.cli.main import main
from timm_igkd.errors import InputError, RunError
from timm_igkd.evaluation import robustness
from timm_igkd.evaluation.corruptions import CORRUPTIONS, corrupt
from timm_igkd.evaluation.evaluated_model import create_evaluated_model
from timm_igkd.evaluation.metrics import Evaluation, evaluate
from timm_igkd.models.loading import save_model


class NoisyShades(Shades):
    """Noisy images of about their shade, each of its own, 12 pixels where the model takes 8."""

    def __getitem__(self, index):
        noise = np.random.default_rng(index).integers(0, 5, (12, 12, 3))
        return Image.fromarray((10 * self.labels[index] + noise).astype(np.uint8)), self.labels[index]


def test_robustness_is_measured_only_on_demand():
    assert "robustness" not in evaluate(ShadeReader(), Shades([0, 1]), **QUIET).metrics


def test_robustness_is_the_accuracy_on_corrupted_images_before_the_transform():
    model, dataset = ShadeReader().eval(), NoisyShades([0, 1, 2, 3, 3, 2, 1])
    robustness = evaluate(model, dataset, corruptions=7, **QUIET).metrics["robustness"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = torch.stack([torch.from_numpy(np.array(dataset[i][0])).permute(2, 0, 1) for i in range(7)])
    for kind in CORRUPTIONS:
        for severity in (1, 2, 3, 4, 5):
            corrupted = corrupt(images, kind, severity).permute(0, 2, 3, 1).numpy()
            logits = model(torch.stack([transform(Image.fromarray(image)) for image in corrupted]))
            right = (logits.argmax(1) == torch.tensor(dataset.labels)).double().mean().item()
            assert robustness["kinds"][kind][severity - 1] == pytest.approx(100 * right)
    assert list(robustness["kinds"]) == list(CORRUPTIONS)
    assert robustness["top1"] == pytest.approx(np.mean(list(robustness["kinds"].values())))
    assert robustness["n"] == 7
    assert 0 < robustness["top1"] < 100


def test_limited_robustness_is_spread_over_the_dataset():
    read = []

    class Recorded(NoisyShades):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    dataset = Recorded([0] * 5 + [3] * 5)
    assert evaluate(ShadeReader(), dataset, corruptions=2, **QUIET).metrics["robustness"]["n"] == 2
    assert read == [*range(10), 0, 5]
    assert evaluate(ShadeReader(), dataset, corruptions=99, **QUIET).metrics["robustness"]["n"] == 10


def test_batches_and_workers_change_no_robustness():
    dataset = NoisyShades([0, 1, 2, 3, 3])
    expected = evaluate(ShadeReader(), dataset, corruptions=5, **QUIET).metrics["robustness"]
    for options in ({"batch_size": 7}, {"batch_size": 81}, {"num_workers": 1}):
        assert evaluate(ShadeReader(), dataset, corruptions=5, **options, **QUIET).metrics["robustness"] == expected


def test_teacher_has_robustness_of_its_own():
    dataset = NoisyShades([0, 1, 2])
    teacher = ShadeReader(num_classes=6, answers=[4, 2, 1, 0], mean=0.5, std=0.25)
    student = ShadeReader(answers=[1, 0, 2, 3])
    indices = [4, 2, 1, 0]
    both = evaluate(student, dataset, teacher=teacher, teacher_class_indices=indices, corruptions=3, **QUIET).metrics
    alone = evaluate(teacher, dataset, class_indices=indices, corruptions=3, **QUIET).metrics
    assert both["teacher"]["robustness"] == alone["robustness"]
    assert both["robustness"]["top1"] < alone["robustness"]["top1"]


def test_negative_number_of_corrupted_images_is_refused():
    with pytest.raises(InputError, match="corruptions must be at least 0, got -1"):
        evaluate(ShadeReader(), Shades([0]), corruptions=-1, **QUIET)


def test_non_finite_logits_of_a_corrupted_image_are_an_error():
    class Fragile(ShadeReader):
        def forward(self, x):
            return super().forward(x) / (x[:, 0, 0, 0] > 0)[:, None]  # a translated image has a black corner

    with pytest.raises(RunError, match="model gives non-finite logits for a corrupted image"):
        evaluate(Fragile(), Shades([1, 2, 3]), corruptions=3, **QUIET)


@pytest.fixture
def evaluate_digits(tmp_path):
    save_model(tiny_teacher(classes=10), tmp_path / "model")
    arguments = ["--model", f"local-dir:{tmp_path / 'model'}", "--dataset", "digits", "--split", "test"]
    return lambda *options: main(["evaluate", *arguments, "--out", str(tmp_path / "metrics.json"), *options])


@pytest.mark.parametrize(("option", "n"), [([], None), (["--corruptions", "4"], 4), (["--corruptions"], 360)])
def test_command_measures_robustness_on_demand(option, n, evaluate_digits, tmp_path, monkeypatch, capsys):
    def stand_in(model, dataset, *, corruptions, **options):
        metrics = {"top1": 90.0, "n": len(dataset), "loss": 0.5}
        if corruptions:
            metrics["robustness"] = {"top1": 50.0, "n": min(corruptions, len(dataset)), "kinds": {}}
        return Evaluation(metrics, torch.zeros(1, 1), torch.zeros(1))

    monkeypatch.setattr(commands, "evaluate", stand_in)
    assert evaluate_digits(*option) == 0
    assert json.loads((tmp_path / "metrics.json").read_text()).get("robustness", {}).get("n") == n
    assert (f"corrupted 50.00 % (n = {n} each)" in capsys.readouterr().out) == (n is not None)


def test_command_refuses_a_negative_number_of_corrupted_images(evaluate_digits, tmp_path, capsys):
    assert evaluate_digits("--corruptions", "-2") == 2
    assert "corruptions must be at least 0" in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("sizes", "side", "expected"),
    [((32, 32), 600, 224), ((32, 288), 600, 329), ((288, 32), 90, 90), ((224, 224), 255, 255), ((224, 224), 257, 256)],
)
def test_large_images_are_corrupted_in_the_size_that_a_model_reads(sizes, side, expected, monkeypatch):
    """Else the transform would average the noise of a photograph away; both models see the same corrupted image."""
    seen = set()

    def record(images, kind, severity, **options):
        seen.add(tuple(images.shape[2:]))
        return images

    monkeypatch.setattr(robustness, "corrupt", record)
    models = []
    for size in sizes:
        model = tiny_teacher(size=32)
        model.pretrained_cfg |= {"input_size": (3, size, size), "crop_pct": 0.875}
        models.append(create_evaluated_model("model", model.eval(), None, ImageList([], [])))
    images = ImageList([noise_image(0, side + 10, side)], [0])
    robustness.measure_robustness(models, images, 1, 4, 0, torch.device("cpu"), progress=False)
    assert seen == {(expected, expected * (side + 10) // side)}
