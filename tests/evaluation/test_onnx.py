"""ONNX files: written as PyTorch answers, read as a model that is evaluated like any other, refused in one line."""

import importlib.metadata
import importlib.util
import json
import logging

import numpy as np
import pytest
import timm
import torch
from command_lines import Runner
from export_parts import SIZE, smallest, text_file, truncated, with_metadata, write_graph
from timm.data import resolve_data_config
from torch import nn

from timm_igkd import load_labeled_images, load_model, save_model
from timm_igkd.errors import InputError, MissingFileError, RunError
from timm_igkd.evaluation import onnx_file
from timm_igkd.evaluation import onnx_latency as latency_module
from timm_igkd.evaluation.latency import time_in_turn
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.evaluation.onnx_file import OPSET, describe_model, open_session, write_onnx
from timm_igkd.evaluation.onnx_latency import onnx_latency, onnx_metrics
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export.record import onnx_environment

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a student of random weights, its file, and a folder that both can be read from."""
    model, folder = smallest(crop_pct=0.9, mean=(0.1, 0.2, 0.3)), tmp_path_factory.mktemp("onnx")
    write_onnx(model, folder / "model.onnx", DIGITS)
    save_model(model, folder / "student", label_names=DIGITS)
    return model, folder / "model.onnx"


# ---- written -------------------------------------------------------------------------------------------------------


def test_file_gives_pytorchs_logits_for_any_batch(written):
    model, path = written
    session = open_session(path)
    for n in (1, 5):
        images = torch.randn(n, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = model(images).numpy()
        (found,) = session.run(None, {"image": images.numpy()})
        assert found.shape == (n, 10)
        assert np.abs(found - expected).max() < 1e-5


def test_outputs_are_called_as_the_caller_calls_them_where_the_model_does_not():
    model = timm.create_model("test_resnet", num_classes=1000)
    names = tuple(f"person {number:04}" for number in range(1000))
    assert describe_model(model, names).class_names == names
    guessed = describe_model(model).class_names
    assert guessed is not None
    assert guessed[:2] == ("n01440764", "n01443537")  # as timm has it
    model.pretrained_cfg["label_names"] = [*reversed(names)]
    assert describe_model(model, names).class_names == names[::-1]


def test_file_names_its_opset_and_holds_preprocessing_and_class_names(written):
    import onnx

    _, path = written
    proto = onnx.load(path)
    assert {entry.version for entry in proto.opset_import if entry.domain == ""} == {OPSET}
    entries = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert entries["class_names"] == list(DIGITS)
    assert (entries["mean"], entries["crop_pct"], entries["input_size"]) == ([0.1, 0.2, 0.3], 0.9, [3, SIZE, SIZE])


def test_export_leaves_the_model_and_the_hosts_logging_as_they_were(tmp_path):
    model = smallest().train()
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    write_onnx(model, tmp_path / "model.onnx")
    assert all(module.training for module in model.modules())
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


def test_a_file_whose_output_differs_is_an_error(tmp_path, monkeypatch):
    export = onnx_file._export

    def other_weights(model: nn.Module, images: torch.Tensor, path: object) -> None:
        export(model, images, path)
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)

    monkeypatch.setattr(onnx_file, "_export", other_weights)
    with pytest.raises(RunError, match=r"ONNX output differs from PyTorch's by .*, expected at most 1e-4"):
        write_onnx(smallest(), tmp_path / "model.onnx")


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path):
    class Refusing(nn.Identity):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input + float(np.random.rand()) if input.sum().item() > 0 else input

    model = smallest()
    model.norm = Refusing()
    with pytest.raises(RunError, match=r"the model cannot be exported to ONNX: [^\n]*$"):
        write_onnx(model, tmp_path / "model.onnx")


# ---- read ----------------------------------------------------------------------------------------------------------


def test_a_file_is_fed_as_its_model_is(written):
    model, path = written
    found = load_onnx_model(path)
    assert resolve_data_config({}, model=found) == resolve_data_config({}, model=model)
    assert (found.num_classes, found.sizes["num_parameters"]) == (10, sum(p.numel() for p in model.parameters()))
    assert found.sizes["size_mb"] == path.stat().st_size / 1e6


def test_a_file_is_evaluated_as_its_model_is(written):
    model, path = written
    digits = load_labeled_images("digits", "test").subset(range(40))
    options = {"measure_latency": False, "progress": False, "corruptions": 4}
    metrics = evaluate(load_onnx_model(path), digits, teacher=model, **options).metrics
    assert metrics["agreement"] == 100
    assert metrics["teacher_kl"] < 1e-9
    teacher = metrics["teacher"]
    assert (metrics["top1"], metrics["macs"]) == (teacher["top1"], teacher["macs"])
    assert metrics["robustness"]["top1"] == pytest.approx(teacher["robustness"]["top1"])
    assert metrics["compression"] == 1


def test_what_a_file_does_not_say_is_null(tmp_path):
    path = with_metadata(write_graph(tmp_path / "mean.onnx"), num_parameters=None, macs=None)
    metrics = evaluate(load_onnx_model(path), load_labeled_images_of_three(), measure_latency=False).metrics
    assert (metrics["num_parameters"], metrics["macs"]) == (None, None)
    both = evaluate(load_onnx_model(path), load_labeled_images_of_three(), teacher=load_onnx_model(path)).metrics
    assert both["compression"] is None
    assert both["latency_ms"]["batch_64"]["median"] > 0


def load_labeled_images_of_three():
    digits = load_labeled_images("digits", "test")
    few = digits.subset([i for i in range(60) if digits[i][1] < 3])
    few.class_names = DIGITS[:3]
    return few


def test_command_evaluates_a_file_beside_a_teacher(written, command: Runner, tmp_path, tiny_images):
    _, path = written
    images = tiny_images(classes=10, n=20, split="test")
    options = ["--dataset", images, "--split", "test", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", path, "--teacher", path, *options)
    assert outcome.code == 2  # its ten classes are other ones
    assert "'class_0' is not among them" in outcome.error
    digits = ["--dataset", "digits", "--split", "test", "--out", tmp_path / "m.json"]
    student = f"local-dir:{path.parent / 'student'}"
    assert command("evaluate", "--model", path, "--teacher", student, *digits).code == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["agreement"] == 100
    assert set(metrics["latency_ms"]) == {"batch_1", "batch_64"}


# ---- refused -------------------------------------------------------------------------------------------------------

UNREADABLE = {
    "text": (lambda folder, path: text_file(folder / "m.onnx"), "is no ONNX file that onnxruntime reads"),
    "empty": (lambda folder, path: (folder / "m.onnx").touch() or folder / "m.onnx", "is no ONNX file"),
    "truncated": (lambda folder, path: truncated(path, folder / "m.onnx"), "is no ONNX file that onnxruntime reads"),
    "no preprocessing": (lambda folder, path: write_graph(folder / "m.onnx"), "says nothing of its preprocessing"),
    "two inputs": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx", inputs=2)), "must take float32"),
    "another size": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx", size=9)), r"\(batch, 3, 16, 16"),
    "one batch": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx", batch=4)), "of any batch"),
    "wrong std": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx"), std=[0, 1, 1]), "std must be"),
    "no mean": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx"), mean="x"), "mean must be a list"),
    "unknown crop": (lambda folder, path: with_metadata(write_graph(folder / "m.onnx"), crop_mode="x"), "crop_mode"),
    "two names": (
        lambda folder, path: with_metadata(write_graph(folder / "m.onnx"), class_names=["a", "b"]),
        "has 3 outputs and 2 class names",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_file_that_cannot_be_used_is_refused(case, written, tmp_path):
    make, message = UNREADABLE[case]
    with pytest.raises(InputError, match=message):
        load_onnx_model(make(tmp_path, written[1]))


def test_command_refuses_a_file_in_one_line(command: Runner, tmp_path):
    options = ["--dataset", "digits", "--split", "test", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", text_file(tmp_path / "model.onnx"), *options)
    assert outcome.code == 2
    assert "is no ONNX file" in outcome.error
    assert not (tmp_path / "m.json").exists()


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="no ONNX file"):
        load_onnx_model(tmp_path / "no.onnx")


def test_option_that_a_file_answers_itself_is_refused(written, command: Runner, tmp_path):
    options = ["--dataset", "digits", "--split", "test", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", written[1], "--mean", 0, 0, 0, *options)
    assert (outcome.code, "--mean has no effect on an ONNX file" in outcome.error) == (2, True)


def test_what_needs_gradients_refuses_a_file():
    with pytest.raises(InputError, match=r"'m\.onnx' is an exported file, which only evaluate reads"):
        load_model("m.onnx", role="teacher")


def test_missing_packages_name_the_extra(monkeypatch, written):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert onnx_file.missing_onnx_packages() == ["onnxruntime"]
    with pytest.raises(InputError, match=r"needs onnxruntime; install with: pip install 'timm-igkd\[onnx\]'"):
        onnx_latency(smallest())
    with pytest.raises(InputError, match=r"reading '.*model.onnx' needs onnxruntime"):
        load_onnx_model(written[1])


def test_version_is_told_where_onnxruntime_is_installed_under_another_name(monkeypatch):
    import onnxruntime

    versions, find = onnx_file.onnx_versions(), importlib.metadata.version
    assert versions["onnxruntime"] == find("onnxruntime")

    def as_onnxruntime_gpu(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "version", as_onnxruntime_gpu)
    assert onnx_environment()["onnxruntime"] == onnxruntime.__version__
    assert onnx_file.onnx_versions()["onnx"] == versions["onnx"]


# ---- timed ---------------------------------------------------------------------------------------------------------


def test_calls_are_timed_in_turn():
    order: list[str] = []
    found = time_in_turn([lambda: order.append("a"), lambda: order.append("b")], seconds=0)
    assert order == ["a", "b"] * 7  # two rounds to warm up
    assert [timing.n for timing in found] == [5, 5]


def test_onnx_latency_is_warm_and_leaves_the_model():
    model = smallest().train()
    found = onnx_latency(model, seconds=0.0)
    assert set(found) == {"batch_1"}
    assert found["batch_1"]["n"] == 5
    assert 0 < found["batch_1"]["median"] <= found["batch_1"]["p90"]
    assert all(module.training for module in model.modules())


def test_metrics_hold_the_latency_where_it_can_be_measured(monkeypatch, caplog):
    measured = {"batch_1": {"median": 1.0, "p90": 2.0, "n": 5}}
    monkeypatch.setattr(latency_module, "onnx_latency", lambda model: measured)
    assert onnx_metrics(nn.Identity()) == {"onnx_latency_ms": measured}

    def fails(model: nn.Module) -> None:
        raise RunError("the model cannot be exported")

    monkeypatch.setattr(latency_module, "onnx_latency", fails)
    assert onnx_metrics(nn.Identity()) == {}
    assert "cannot be exported" in caplog.text
    monkeypatch.setattr(latency_module, "missing_onnx_packages", lambda: ["onnx"])
    assert onnx_metrics(nn.Identity()) == {}
