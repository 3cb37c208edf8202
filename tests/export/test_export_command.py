"""`timm-igkd export`: what it says, how it ends, and what it refuses in one line."""

import importlib.util
import json

import pytest
from command_lines import Runner
from export_parts import SIZE, digits_student, smallest

from timm_igkd import save_model
from timm_igkd.cli import export_command
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export import int8 as int8_module
from timm_igkd.intervals import three_digits

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.usefixtures("quick_timing"), pytest.mark.filterwarnings("ignore")]  # of torch's exporter
DIGITS = ("--dataset", "digits")
INT8 = ("--int8", *DIGITS, "--split", "train", "--calibration", 32)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    save_model(digits_student(), folder / "reader", label_names=list("0123456789"))
    save_model(smallest(), folder / "smallest")
    return lambda name: f"local-dir:{folder / name}"


@pytest.mark.slow
def test_files_are_told_with_their_numbers(student, command: Runner, tmp_path):
    out = tmp_path / "new" / "export"
    outcome = command("export", "--model", student("reader"), "--out", out, *INT8, "--evaluate-split", "test")
    assert outcome.code == 0
    record = json.loads((out / "export.json").read_text())
    lines = outcome.output.splitlines()
    for line, file in zip(lines, record["exports"], strict=False):
        assert line.startswith(
            f"{out / file['file']}: {three_digits(file['size_mb'])} MB, top1 {file['top1']:.2f} % (PyTorch "
        )
        assert f"on {file['agreement']:.2f} % of 360 images of test" in line
    assert lines[2].startswith(f"recommended: {record['recommended']}; int8 is ")
    assert record["quantisation"]["calibrated_on"] == {"n": 32, "dataset": "digits", "split": "train"}


@pytest.mark.slow
def test_too_large_a_drop_ends_with_1_and_keeps_marked_files(student, command: Runner, tmp_path, monkeypatch):
    quantise = int8_module.quantise

    def per_noise(source, target, batches, **options):
        quantise(source, target, [batch * 0.01 for batch in batches], **options)  # ranges that cut everything off

    monkeypatch.setattr(int8_module, "quantise", per_noise)
    out = tmp_path / "export"
    outcome = command("export", "--model", student("reader"), "--out", out, *INT8, "--evaluate-split", "test")
    assert outcome.code == 1
    record = json.loads((out / "export.json").read_text())
    floats, int8 = record["exports"]
    assert (record["passed"], floats["passed"], int8["passed"], record["recommended"]) == (False, True, False, "onnx")
    assert int8["drop"] > 0.5
    numbers = f"onnx-int8 {int8['drop']:.2f} ({record['pytorch_top1']:.2f} to {int8['top1']:.2f} %), at most 0.5"
    assert numbers in outcome.error
    assert load_onnx_model(out / "model_int8.onnx").num_classes == 10


def test_int8_that_is_slower_is_reported_and_float_recommended(student, command: Runner, tmp_path, monkeypatch):
    timed = [Timing(1.0, 1.0, 5), Timing(1.5, 1.5, 5)]
    monkeypatch.setattr("timm_igkd.export.verification.time_files", lambda paths, **options: timed)
    outcome = command("export", "--model", student("smallest"), "--out", tmp_path / "export", *INT8)
    assert outcome.code == 0
    assert "recommended: onnx; int8 is slower than float on this machine, 1.50 of its time" in outcome.output


@pytest.mark.parametrize("name", ["smallest", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_input_size_can_be_chosen(name, student, command: Runner, tmp_path):
    model = student(name)
    if name == "test_vit":  # a model whose weights are fitted to the size as it is built
        from tiny_parts import tiny_teacher

        save_model(tiny_teacher("test_vit", classes=2, size=160), tmp_path / "vit")
        model = f"local-dir:{tmp_path / 'vit'}"
    outcome = command("export", "--model", model, "--out", tmp_path / "export", "--img-size", 2 * SIZE)
    assert outcome.code == 0, outcome.error
    found = load_onnx_model(tmp_path / "export" / "model.onnx")
    assert found.pretrained_cfg["input_size"] == (3, 2 * SIZE, 2 * SIZE)


REFUSED = {
    "int8 without images": (["--int8"], "--int8 needs images to calibrate with"),
    "int8 without a split": (["--int8", *DIGITS], "--int8 needs images to calibrate with"),
    "a split without a dataset": (["--evaluate-split", "test"], "--evaluate-split test is a split of no dataset"),
    "a column without a dataset": (["--label-column", "label"], "--label-column has no effect without --dataset"),
    "a dataset without a split": (DIGITS, "--dataset digits has no effect alone"),
    "a calibration split that is not there": (["--int8", *DIGITS, "--split", "trian"], "no split 'trian'"),
    "a test split that is not there": ([*INT8, "--evaluate-split", "tset"], "no split 'tset'"),
    "no image to calibrate with": ([*INT8, "--calibration", 0], "calibration must be at least 1, got 0"),
    "a drop below 0": (["--max-drop", -1], "max_drop must be in [0, 100], got -1"),
    "no input size": (["--img-size", 0], "img_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_end_with_2_and_one_line(case, student, command: Runner, tmp_path):
    options, message = REFUSED[case]
    outcome = command("export", "--model", student("smallest"), "--out", tmp_path / "export", *options)
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "export").exists()


def test_classes_that_differ_end_with_2_and_one_line(student, command: Runner, tmp_path, tiny_images):
    data = ["--dataset", tiny_images(classes=10, n=20), "--split", "train"]
    outcome = command("export", "--model", student("reader"), "--out", tmp_path / "export", "--int8", *data)
    assert (outcome.code, "'class_0' is not among them" in outcome.error) == (2, True)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("place", ["file", "/proc", "folder in the way"])
def test_folder_that_cannot_be_written_ends_with_2_and_one_line(place, student, command: Runner, tmp_path):
    out = {"file": tmp_path / "file", "/proc": "/proc", "folder in the way": tmp_path / "export"}[place]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "export" / "model.onnx").mkdir(parents=True)
    outcome = command("export", "--model", student("smallest"), "--out", out)
    assert outcome.code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_extra_ends_with_2_and_one_line(command: Runner, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    monkeypatch.setattr(export_command, "model_from", None)  # before any work
    outcome = command("export", "--model", "test_resnet", "--out", tmp_path / "export")
    assert outcome.code == 2
    assert "an export needs onnx; install with: pip install 'timm-igkd[onnx]'" in outcome.error


def test_images_to_calibrate_with_are_none_of_a_float_file(student, command: Runner, tmp_path):
    outcome = command("export", "--model", student("smallest"), "--out", tmp_path / "out", "--calibration", 32)
    assert outcome.code == 2
    assert "--calibration 32 has no effect without --int8; add it, or leave it out" in outcome.error
