"""--export: the student's files for the edge are a stage of the run, and stand in metrics.json, on page and card."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import Outcome, Runner, tiny_run, two_splits
from tiny_parts import NUMBERS
from torch import nn

from timm_igkd import load_model
from timm_igkd.errors import InputError
from timm_igkd.evaluation import onnx_file
from timm_igkd.export import student as student_export
from timm_igkd.export.record import read_export_record
from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run
from timm_igkd.report.run_files import parse_metrics

INT8 = ["--export", "onnx", "onnx-int8"]


@pytest.fixture
def run(recipe: Runner, tiny_images, teacher_folder, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Return `run(*flags) -> Outcome`, of the same run in the same folder each time."""
    monkeypatch.setattr("timm_igkd.export.verification.TIMING_S", 0.05)
    images = two_splits(tiny_images)
    teacher = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0, "--overlay-prob", 0]

    def run(*options: object) -> Outcome:
        return recipe(*tiny_run(images, *teacher, *options))

    return run


@pytest.mark.slow
def test_exported_files_stand_in_metrics_on_page_and_card(run, tmp_path):
    outcome = run(*INT8)
    assert outcome.code == 0, outcome.error
    folder = tmp_path / "runs" / "run"
    record = read_export_record(folder / "export")
    assert record.quantisation is not None
    assert (record.quantisation.calibrated_on.split, record.verified_on.split) == ("train", "test")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["file"] for entry in metrics["exports"]] == ["model.onnx", "model_int8.onnx"]
    assert metrics["exports"] == record.metrics()
    assert set(metrics["exports"][0]) >= {"format", "file", "size_mb", "top1", "agreement", "latency_ms", "runtime"}
    assert metrics["exports"][0]["top1"] == metrics["top1"]  # of the float file, on the same images
    page = (folder / "report" / "index.html").read_text()
    card = model_card(load_model(f"local-dir:{folder / 'student'}"), "user/name", read_run(folder))
    for text in (page, str(card)):
        assert "For the edge" in text
        assert "model_int8.onnx" in text
        assert "take this one" in text
    told = [line for line in outcome.output.splitlines() if "PyTorch's answer on" in line]
    files = [str(folder / "export" / entry["file"]) for entry in metrics["exports"]]
    assert [line.split(": ")[0] for line in told] == files

    again = run(*INT8)
    assert "export: complete, skipped" in again.output
    without = run()
    assert without.code == 0
    assert "exports" not in json.loads((folder / "metrics.json").read_text())
    assert "For the edge" not in (folder / "report" / "index.html").read_text()


@pytest.mark.slow
def test_a_finished_run_is_exported_without_training_again(run, monkeypatch):
    exported: list[tuple[nn.Module, dict]] = []
    real = student_export.export_student

    def export(model, out, **options):
        exported.append((model, options))
        return real(model, out, **options)

    monkeypatch.setattr("timm_igkd.runs.job.export_student", export)
    assert run().code == 0
    assert exported == []
    outcome = run("--export", "onnx")
    assert (outcome.code, len(exported)) == (0, 1)
    assert "student: complete, skipped" in outcome.output
    assert exported[0][1]["int8"] is False


def test_packages_that_are_missing_are_named_before_anything_is_trained(run, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "missing_onnx_packages", lambda: ["onnxscript"])
    outcome = run("--export", "onnx")
    assert (outcome.code, "pip install 'timm-igkd[onnx]'" in outcome.error) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_student_that_cannot_be_exported_ends_the_run_before_anything_is_trained(run, monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("torch.onnx.export", lambda *args, **kwargs: refuse())
    outcome = run("--export", "onnx")
    assert outcome.code == 1
    assert "the model cannot be exported to ONNX: no such operator" in outcome.error
    assert not (tmp_path / "runs" / "run" / "student").exists()


@pytest.mark.parametrize("fault", ["refused", "rubbish"])
def test_a_student_that_cannot_be_quantised_ends_the_run_before_anything_is_trained(fault, run, monkeypatch, tmp_path):
    def quantise(source: object, target: Path, *args: object, **kwargs: object) -> None:
        if fault == "refused":
            raise ValueError("no such operator")
        target.write_bytes(b"rubbish")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", quantise)
    outcome = run(*INT8)
    assert outcome.code == 1
    why = "the file cannot be quantised: no such operator" if fault == "refused" else "does not run the int8 file: "
    assert why in outcome.error
    assert "; export it without int8" in outcome.error
    assert not (tmp_path / "runs" / "run" / "student").exists()


def test_unknown_format_offers_the_nearest(run):
    outcome = run("--export", "onnx-int")
    assert (outcome.code, "onnx-int8" in outcome.error) == (2, True)


@pytest.mark.parametrize("exports", [{}, "onnx", [{"format": "onnx"}], [{"format": "tflite"}], [3]])
def test_damaged_entries_of_metrics_are_one_line(exports):
    with pytest.raises(InputError, match=r"metrics\.json: exports"):
        parse_metrics(NUMBERS | {"exports": exports or {"a": 1}}, "metrics.json")
