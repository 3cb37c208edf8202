"""Where a run's models start: their weights are found before the first stage, and what they started from is told."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from command_lines import Runner, tiny_run, two_splits
from huggingface_hub import constants
from tiny_parts import tiny_teacher

from timm_igkd import load_model, save_model
from timm_igkd.report.run_files import read_metrics
from timm_igkd.runs.models import Pretrained, create_student
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training.trainer import Trainer

HUB_NAME = "test_resnet.r160_in1k"


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.fixture
def trained_teacher(teacher_folder) -> list[object]:
    return ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}", "--overlay-prob", 0]


@pytest.fixture
def student_folder(tmp_path) -> Path:
    """Return a saved network of 5 classes, none of them the images'."""
    save_model(tiny_teacher(classes=5, size=16, seed=3), tmp_path / "start", label_names=list("abcde"))
    return tmp_path / "start"


@pytest.fixture
def starts(monkeypatch):
    """Return {label: state dict before training}; nothing is trained."""
    found = {}

    def fit(self, progress=True):
        found[self.label] = {name: tensor.clone() for name, tensor in self.final_model().state_dict().items()}

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def starts_from(found, expected, head="fc") -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith(head))


def config_of(tmp_path) -> RunConfig:
    return parse_config(RunConfig, ["--config", str(tmp_path / "runs" / "run" / "config.yaml")])


# ---- the student ----


def test_pretrained_student_starts_from_a_folder_with_a_new_head(
    recipe: Runner, images, trained_teacher, student_folder, starts, tmp_path
):
    options = ["--student", f"local-dir:{student_folder}", "--student-init", "pretrained"]
    assert recipe(*tiny_run(images, *trained_teacher, *options)).code == 0
    assert starts_from(starts["student"], tensors(student_folder))
    assert starts["student"]["fc.weight"].shape[0] == 2
    saved = timm.create_model(f"local-dir:{tmp_path / 'runs' / 'run' / 'student'}", pretrained=True)
    assert saved.pretrained_cfg["label_names"] == ["class_0", "class_1"]


def test_random_student_of_the_same_folder_takes_none_of_its_weights(
    recipe: Runner, images, trained_teacher, student_folder, starts, tmp_path
):
    options = ["--student", f"local-dir:{student_folder}", "--student-init", "random"]
    assert recipe(*tiny_run(images, *trained_teacher, *options)).code == 0
    assert not starts_from(starts["student"], tensors(student_folder))
    assert license_told(tmp_path) == "apache-2.0"


def license_told(folder: Path) -> str | None:
    """Return the license that the saved student of a run tells."""
    config = json.loads((folder / "runs" / "run" / "student" / "config.json").read_text())
    return config["pretrained_cfg"].get("license")


def test_pretrained_student_starts_from_a_checkpoint_of_no_license_that_is_known(
    recipe: Runner, images, trained_teacher, student_folder, starts, tmp_path
):
    file = student_folder / "model.safetensors"
    options = ["--student", "test_resnet", "--student-checkpoint", file, "--student-args", "num_classes=5"]
    assert recipe(*tiny_run(images, *trained_teacher, *options, "--student-init", "pretrained")).code == 0
    assert starts_from(starts["student"], tensors(student_folder))
    assert timm.create_model("test_resnet").pretrained_cfg["license"] == "apache-2.0"
    assert license_told(tmp_path) is None


def test_pretrained_student_starts_from_the_cache_of_the_hub_without_a_network(
    recipe: Runner, hub, images, trained_teacher, starts, monkeypatch
):
    weights = timm.create_model("test_resnet").state_dict()
    hub.add(f"timm/{HUB_NAME}").commit({"model.safetensors": safetensors.torch.save(weights)})
    load_model(HUB_NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    options = ["--student", HUB_NAME, "--student-init", "pretrained"]
    assert recipe(*tiny_run(images, *trained_teacher, *options)).code == 0
    assert starts_from(starts["student"], weights)
    assert len(hub.requests) == asked


def test_pretrained_truncated_student_keeps_the_teachers_weights(
    recipe: Runner, images, trained_teacher, teacher_folder, starts, tmp_path
):
    options = ["--student-init", "pretrained", "--student-drop", 1]
    assert recipe(*tiny_run(images, *trained_teacher, *options)).code == 0
    kept = {name.removeprefix("base."): tensor for name, tensor in starts["student"].items()}
    assert torch.equal(kept["conv1.0.weight"], tensors(teacher_folder)["conv1.0.weight"])
    assert config_of(tmp_path).student_init == "teacher"


def test_name_without_weights_starts_random_and_that_is_said_once(
    recipe: Runner, images, trained_teacher, starts, tmp_path
):
    options = ["--student", "resnet20_cifar", "--student-init", "pretrained"]
    outcome = recipe(*tiny_run(images, *trained_teacher, *options))
    assert outcome.code == 0
    assert outcome.output.count("no pretrained weights of the name 'resnet20_cifar', so it starts from random") == 1
    assert config_of(tmp_path).student_init == "random"
    assert "no pretrained weights" not in recipe(*tiny_run(images, *trained_teacher, *options)).output


def test_changed_start_of_a_finished_student_is_refused(
    recipe: Runner, images, trained_teacher, student_folder, starts, tmp_path
):
    options = ["--student", f"local-dir:{student_folder}", "--student-init", "pretrained"]
    assert recipe(*tiny_run(images, *trained_teacher, *options)).code == 0
    save_model(tiny_teacher(classes=5, size=16, seed=4), student_folder, label_names=list("abcde"))
    outcome = recipe(*tiny_run(images, *trained_teacher, *options))
    assert outcome.code == 2
    assert "stage student" in outcome.error
    assert "other student's files than are there now" in outcome.error


# ---- the teacher ----


def test_teacher_is_fine_tuned_from_its_weights_with_a_new_head_and_its_own_rate(
    recipe: Runner, images, student_folder, tmp_path
):
    options = ["--teacher", f"local-dir:{student_folder}", "--teacher-init", "pretrained", "--overlay-prob", 0]
    outcome = recipe(*tiny_run(images, *options, "--teacher-lr", 1e-9, "--warmup-epochs", 0, "--min-lr", 0))
    assert outcome.code == 0, outcome.error
    found = tensors(tmp_path / "runs" / "run" / "teacher")
    start = tensors(student_folder)
    assert found["fc.weight"].shape[0] == 2
    assert all(torch.allclose(found[name], start[name], atol=1e-6) for name in start if name.endswith("conv1.weight"))
    assert not torch.equal(found["bn1.running_mean"], start["bn1.running_mean"])
    page = (tmp_path / "runs" / "run" / "report" / "index.html").read_text()
    assert "trained here for 1 epochs from its pretrained weights" in page
    assert "trained from random weights" in page  # the student


def test_frozen_batch_norms_keep_their_statistics(recipe: Runner, images, student_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    options = ["--teacher", f"local-dir:{student_folder}", "--teacher-init", "pretrained", "--overlay-prob", 0]
    assert recipe(*tiny_run(images, *options, "--freeze-teacher-bn")).code == 0
    found, start = tensors(tmp_path / "runs" / "run" / "teacher"), tensors(student_folder)
    assert all(torch.equal(found[name], start[name]) for name in start if "running" in name)
    assert not torch.equal(found["bn1.weight"], start["bn1.weight"])
    student = tensors(tmp_path / "runs" / "run" / "student")
    assert not torch.equal(student["base.bn1.running_mean"], torch.zeros_like(student["base.bn1.running_mean"]))


@pytest.fixture
def of_no_batch(student_folder, tmp_path) -> Path:
    """Return a model folder whose first batch norm's bias makes up for a running mean that is no batch's."""
    folder = tmp_path / "of_no_batch"
    shutil.copytree(student_folder, folder)
    found = tensors(folder)
    spread = (found["bn1.running_var"] + 1e-5).sqrt() / found["bn1.weight"]
    found["bn1.bias"] -= 50
    found["bn1.running_mean"] -= 50 * spread
    safetensors.torch.save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_weights_that_see_no_difference_in_training_mode_ask_for_frozen_batch_norms(
    name, recipe: Runner, images, student_folder, of_no_batch, tmp_path, monkeypatch
):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    folders = {"teacher": student_folder, "student": student_folder, name: of_no_batch}
    options = [
        word for role in folders for word in (f"--{role}", f"local-dir:{folders[role]}", f"--{role}-init", "pretrained")
    ]
    refused = recipe(*tiny_run(images, *options, "--overlay-prob", 0))
    assert (refused.code, f"add --freeze-{name}-bn" in refused.error) == (2, True)
    assert not (tmp_path / "runs").exists()
    assert recipe(*tiny_run(images, *options, "--overlay-prob", 0, f"--freeze-{name}-bn")).code == 0
    kept, start = tensors(tmp_path / "runs" / "run" / name), tensors(of_no_batch)
    assert torch.equal(kept["bn1.running_mean"], start["bn1.running_mean"])


@pytest.mark.slow
def test_fine_tuned_teacher_beats_its_random_start(recipe: Runner, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    images = two_splits(tiny_images, n=64, classes=4)
    run = tmp_path / "runs"
    common = ["--overlay-prob", 0, "--lr", 3e-3, "--validation-fraction", 0.5, "--batch-size", 16]
    assert recipe(*tiny_run(images, *common, "--teacher-epochs", 12, "--name", "source")).code == 0
    starts = [*common, "--teacher", f"local-dir:{run / 'source' / 'teacher'}"]
    top1 = {}
    for init in ("pretrained", "random"):
        assert recipe(*tiny_run(images, *starts, "--teacher-init", init, "--name", init)).code == 0
        top1[init] = float((run / init / "teacher_history.csv").read_text().splitlines()[-1].split(",")[-2])
    assert top1["pretrained"] > top1["random"] + 10


def test_layer_decay_gives_the_body_a_lower_rate_than_the_head(
    recipe: Runner, images, student_folder, starts, monkeypatch
):
    rates = {}
    fit = Trainer.fit

    def record(self, progress=True):
        rates[self.label] = {group["lr_scale"] for group in self.optimizer.param_groups}
        return fit(self, progress)

    monkeypatch.setattr(Trainer, "fit", record)
    options = ["--teacher", f"local-dir:{student_folder}", "--teacher-init", "pretrained", "--overlay-prob", 0]
    assert recipe(*tiny_run(images, *options, "--layer-decay", 0.5)).code == 0
    assert max(rates["teacher"]) == 1
    assert min(rates["teacher"]) < 0.5


# ---- found before the first stage ----


@pytest.fixture
def no_network(hub, monkeypatch):
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--student", HUB_NAME, "--student-init", "pretrained"], "--student-init random, --student local-dir:FOLDER"),
        (["--student", "hf-hub:user/none"], "--student local-dir:FOLDER or --student-checkpoint FILE"),
        (["--teacher", HUB_NAME], "without the Hub: --teacher local-dir:FOLDER or --teacher-checkpoint FILE"),
        (["--teacher", HUB_NAME, "--teacher-init", "pretrained", "--teacher-epochs", 1], "--teacher-init random"),
    ],
    ids=["student", "student of a repository", "given teacher", "teacher to fine-tune"],
)
def test_weights_out_of_reach_end_the_run_before_it_begins(
    options, remedy, recipe: Runner, images, trained_teacher, no_network, tmp_path
):
    outcome = recipe(*tiny_run(images, *trained_teacher, *options))
    assert outcome.code == 1
    assert remedy in outcome.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "resnet81"], "unknown model 'resnet81'"),
        (["--student", "test_resnet.r16_in1k", "--student-init", "pretrained"], "unknown pretrained tag"),
        (["--student", "local-dir:none", "--student-init", "pretrained"], "no model folder"),
        (
            ["--student", "test_resnet", "--student-init", "pretrained", "--student-checkpoint", "none.safetensors"],
            "no checkpoint file 'none.safetensors' .--student-checkpoint",
        ),
        (["--student", "test_resnet", "--student-checkpoint", "f"], "student_init random does not use"),
        (["--student-checkpoint", "f"], "student is none"),
        (["--teacher-init", "random"], "learned nothing"),
        (["--freeze-teacher-bn"], "freeze_teacher_bn keeps"),
        (["--freeze-student-bn", "--student", "test_resnet"], "freeze_student_bn keeps"),
        (["--img-size", 0], "img_size must be"),
        (["--layer-decay", 2], r"layer_decay must be in \(0, 1\]"),
        (["--protocol", "modren"], r"--protocol must be .*did you mean 'modern'"),
        (["--protocol", "modern", "--teacher", ""], "protocol modern needs a teacher"),
    ],
)
def test_start_that_cannot_be_leaves_no_folder(
    options, message, recipe: Runner, images, trained_teacher, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = recipe(*tiny_run(images, *trained_teacher, *options))
    assert outcome.code == 2

    assert re.search(message, outcome.error), outcome.error
    assert not (tmp_path / "runs").exists()


def test_checkpoint_that_does_not_fit_leaves_no_folder(
    recipe: Runner, images, trained_teacher, student_folder, tmp_path
):
    file = student_folder / "model.safetensors"
    options = ["--student", "test_resnet", "--student-init", "pretrained", "--student-checkpoint", file]
    outcome = recipe(*tiny_run(images, *trained_teacher, *options))
    assert outcome.code == 2
    assert "num_classes=5" in outcome.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_teacher_that_is_trained_here_counts_its_outputs_as_the_images_do(init, images, recipe, tmp_path):
    """A folder's names in another order would be kept for a head that learns the images' own."""
    found = {}
    for name, labels in (("named", ["class_1", "class_0"]), ("plain", None), ("others", ["a", "b"])):
        save_model(tiny_teacher(), tmp_path / f"teacher_{name}", label_names=labels)
        options = ["--name", name, "--teacher", f"local-dir:{tmp_path / f'teacher_{name}'}", "--teacher-init", init]
        outcome = recipe(*tiny_run(images, *options, "--overlay-prob", 0, "--student", "test_resnet"))
        assert outcome.code == 0, outcome.error
        run = tmp_path / "runs" / name
        saved = load_model(f"local-dir:{run / 'teacher'}")
        assert saved.pretrained_cfg["label_names"] == ["class_0", "class_1"]
        found[name] = read_metrics(run / "metrics.json")
    if init == "random":
        assert {m.teacher.top1 for m in found.values()} == {found["plain"].teacher.top1}
        assert {m.top1 for m in found.values()} == {found["plain"].top1}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("names", [None, list("abcde"), list("edcba")])
def test_student_forgets_the_names_of_the_folder_it_starts_from(weights, names, student_folder):
    """The data set's are saved with it; of classes that are numbers there are none."""
    start = Pretrained(names, None, use_ema=False, weights=True) if weights else None
    name = f"local-dir:{student_folder}"
    student = create_student(name, {}, 0, lambda: None, num_classes=5, image_size=(16, 16), seed=0, start=start)
    assert "label_names" not in student.pretrained_cfg
