"""A student in timm-style scripts that know nothing of the plugin: validate, inference, ONNX export."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_lines import subprocess_environment
from torch import nn

from timm_igkd import truncate, with_plugin
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.models.loading import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # timm leaves the images it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]

SCRIPTS = Path(__file__).parent / "timm_scripts"
SIZE = 32


def student(name: str) -> nn.Module:
    """Return a student with random weights whose logits are of order 1."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}
    if name == "mobilenetv2_cifar":
        model = timm.create_model(name, num_classes=3, drop_blocks=9, pretrained_cfg_overlay=overlay)
    else:
        model = truncate(timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=overlay), 2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        logits = model.train()(torch.randn(32, 3, SIZE, SIZE))  # sets the statistics of the batch norms
        classifier: nn.Linear = model.get_classifier()  # type: ignore[operator]
        classifier.weight /= logits.std()
    return model.eval()


STUDENTS = ["mobilenetv2_cifar", "igkd_truncated"]


@pytest.fixture(params=STUDENTS)
def saved(request, tmp_path) -> tuple[nn.Module, str]:
    """A student, and the name that timm loads it by."""
    model = student(request.param)
    assert model.pretrained_cfg["architecture"] == request.param
    save_model(model, tmp_path / "student")
    return model, f"local-dir:{tmp_path / 'student'}"


@pytest.fixture
def images(tiny_images) -> Path:
    return tiny_images(kind="folder", n=9, size=40, classes=3, split="validation")


def run(script: str, *arguments: object) -> None:
    assert with_plugin.main([str(SCRIPTS / script), *map(str, arguments)]) == 0


def test_validation_script_measures_what_evaluate_does(saved, images, tmp_path):
    model, name = saved
    run("validate.py", images, "--model", name, "--pretrained", "--results-file", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    ours = evaluate(model, timm.data.create_dataset("", root=str(images)), measure_latency=False, progress=False)
    assert results["count"] == ours.metrics["n"] == 9
    assert results["top1"] == pytest.approx(ours.metrics["top1"])
    assert results["loss"] == pytest.approx(ours.metrics["loss"], abs=1e-4)


def test_validation_script_takes_architecture_arguments_and_a_checkpoint(images, tmp_path):
    model = student("igkd_truncated")
    save_model(model, tmp_path / "student")
    arguments = ["base=test_resnet", "base_args={}", "drop=2"]
    weights = tmp_path / "student" / "model.safetensors"
    options = ["--model-kwargs", *arguments, "--num-classes", 3, "--checkpoint", weights]
    run("validate.py", images, "--model", "igkd_truncated", *options, "--results-file", tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["count"] == 9


def test_inference_script_writes_a_row_per_image(saved, images, tmp_path):
    run("inference.py", images, "--model", saved[1], "--pretrained", "--results-file", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert all(1 / 3 <= float(row["prob"]) <= 1 and row["index"] in "012" for row in rows)


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
@pytest.mark.parametrize("exporter", [[], pytest.param(["--dynamo"], marks=pytest.mark.slow)], ids=["trace", "dynamo"])
def test_export_script_writes_an_onnx_file_that_agrees(saved, tmp_path, exporter):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, name = saved
    run("onnx_export.py", tmp_path / "student.onnx", "--model", name, "--pretrained", "--batch-size", 2, *exporter)
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    batch = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    with torch.no_grad():
        expected = model(batch).numpy()
    assert np.abs(expected).max() > 0.3
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.slow
def test_a_fresh_process_needs_the_plugin_and_has_it(images, tmp_path):
    save_model(student("igkd_truncated"), tmp_path / "student")
    script = [str(SCRIPTS / "validate.py"), str(images), "-m", f"local-dir:{tmp_path / 'student'}", "--pretrained"]

    def done(*launcher: str) -> subprocess.CompletedProcess:
        environment = subprocess_environment(tmp_path / "home")
        command = [sys.executable, *launcher, *script]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    assert "Unknown model (igkd_truncated)" in done().stderr
    with_it = done("-m", "timm_igkd.with_plugin")
    assert with_it.returncode == 0, with_it.stderr
    assert json.loads(with_it.stdout)["count"] == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a script to run"),
        (["-m"], "expected a script to run"),
        (["no.py"], "'no.py' does not exist"),
        (["-m", "no.module"], "module 'no.module' does not exist, there is no 'no'"),
        (["-m", "timm.no"], "module 'timm.no' does not exist, there is no 'timm.no'"),
        (["-m", "timm.models.vgg.no"], "'timm.models.vgg' is no package"),
        (["-m", "timm"], "package 'timm' cannot be run, it has no module __main__"),
        (["-m", "."], "module '.' does not exist"),
    ],
)
def test_no_script_is_one_line(capsys, argv, message):
    assert with_plugin.main(argv) == 2
    assert message in capsys.readouterr().err


def test_script_sees_its_own_arguments_folder_and_name(tmp_path, capsys):
    (tmp_path / "beside.py").write_text("value = 3")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(__name__, sys.argv[1:], beside.value, __file__ == sys.argv[0])\n")
    before = sys.argv, list(sys.path)
    assert with_plugin.main([str(script), "--lr", "3"]) == 0
    sys.modules.pop("beside")
    assert capsys.readouterr().out == "__main__ ['--lr', '3'] 3 True\n"
    assert (sys.argv, sys.path) == before
