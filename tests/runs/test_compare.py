"""--compare: arms of equal start, order and crops, each trained once; a verdict that opens page and card."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import Runner, leave_empty_page, tiny_run, two_splits
from torch import Tensor

from timm_igkd import load_model
from timm_igkd.errors import InputError, RunError
from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.runs.students import arms_of
from timm_igkd.training.trainer import Trainer

OVERLAY = ["--overlay-prob", 0.5, "--distill-loss-weight", 0.5]
PLAIN = ["--overlay-prob", 0, "--distill-loss-weight", 0.5]


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.fixture
def compared(recipe: Runner, images, teacher_folder, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Return `compared(*flags, report=False) -> folder`: a run with --compare ends well."""

    def compared(*options: object, report: bool = False) -> Path:
        with monkeypatch.context() as patch:
            if not report:
                patch.setattr("timm_igkd.runs.job.write_report", leave_empty_page)
            teacher = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0]
            outcome = recipe(*tiny_run(images, *teacher, "--compare", *options))
        assert outcome.code == 0, outcome.error
        compared.output = outcome.output
        return tmp_path / "runs" / "run"

    return compared


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Return the labels of all that is trained, in order."""
    labels: list[str] = []
    real = Trainer.fit

    def fit(self: Trainer, *args: Any) -> Any:
        labels.append(self.label)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "fit", fit)
    return labels


def arms(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())["arms"]


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- arms ----


@pytest.mark.parametrize("batches", ["workers", "device"])
def test_arms_share_initial_weights_order_and_crops(batches, compared, monkeypatch):
    seen: dict[str, list[Tensor]] = {}
    real = Trainer.train_step

    def train_step(self: Trainer, batch: Any, epoch: int, step: int) -> Any:
        if epoch == step == 0:
            state = self.task.get_eval_model().state_dict()
            seen[self.label] = [state[name].detach().clone() for name in sorted(state)]
        seen[self.label] += [batch.labels.clone()]
        if self.label != "student":  # the run's own sees overlays
            seen[self.label] += [batch.student.clone()]
        return real(self, batch, epoch, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    compared(*OVERLAY, "--epochs", 2, "--hflip", 0.5, "--batches", batches)
    assert set(seen) == {"student", "alone-0", "kd-0"}
    assert all(torch.equal(a, b) for a, b in zip(seen["alone-0"], seen["kd-0"], strict=True))
    without_images = [tensor for tensor in seen["kd-0"] if tensor.ndim != 4 or tensor.shape[0] != 4]
    own = [tensor for tensor in seen["student"] if tensor.ndim != 4 or tensor.shape[0] != 4]
    assert len(own) > 20
    assert all(torch.equal(a, b) for a, b in zip(own, without_images, strict=True))


def test_where_the_overlay_is_off_there_are_two_arms_and_no_maps(compared, trainings):
    run = compared(*PLAIN)
    assert trainings == ["student", "alone-0"]
    assert [(arm["arm"], arm["seed"]) for arm in arms(run)["students"]] == [("alone", 0), ("kd", 0)]
    assert [(d["arm"], d["baseline"], d["over"], d["n"]) for d in arms(run)["differences"]] == [
        ("kd", "alone", "images", 8)
    ]
    assert not (run / "maps").exists()


@pytest.mark.parametrize(("name", "value"), [("num_processes", 8), ("mixed_precision", "bf16"), ("compile", True)])
def test_arms_are_trained_by_the_launch_of_the_student_they_are_held_against(
    name, value, recipe: Runner, images, teacher_folder, trainings, tmp_path
):
    options = [*PLAIN, "--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0]
    assert recipe(*tiny_run(images, *options)).code == 0
    marker = tmp_path / "runs" / "run" / ".stages" / "student.json"
    content = json.loads(marker.read_text())
    content["launch"][name] = value
    marker.write_text(json.dumps(content))
    outcome = recipe(*tiny_run(images, *options, "--compare"))
    assert outcome.code == 2
    assert f"arm kd-0 of {tmp_path / 'runs' / 'run'} was trained with {name} = {value!r}, now it is" in outcome.error
    assert "launch it as before" in outcome.error
    assert trainings == ["student"]


def test_student_alone_learns_from_labels_alone(compared):
    run = compared(*OVERLAY)
    header, row = (run / "arms" / "alone-0" / "student_history.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert values["distill_loss"] == values["attention_loss"] == ""
    assert float(values["loss"]) == pytest.approx(float(values["task_loss"]))


def test_finished_arms_are_not_trained_again(compared, trainings):
    before = files(compared(*OVERLAY))
    trainings.clear()
    after = files(compared(*OVERLAY))
    assert trainings == []
    assert after == before


def test_a_finished_run_gets_its_arms_later(compared, trainings, recipe, images, teacher_folder):
    run = compared(*PLAIN, "--compare", "none")
    assert "arms" not in json.loads((run / "metrics.json").read_text())
    compared(*PLAIN, report=True)
    assert trainings == ["student", "alone-0"]
    assert "Was it worth it?" in (run / "report" / "index.html").read_text()
    assert parse_config(RunConfig, ["--config", str(run / "config.yaml")]).compare == "arms"


def test_more_seeds_train_the_new_ones_and_tell_it_over_seeds(compared, trainings):
    run = compared(*PLAIN)
    trainings.clear()
    compared(*PLAIN, "--seeds", 3)
    assert trainings == ["alone-1", "kd-1", "alone-2", "kd-2"]
    (difference,) = arms(run)["differences"]
    assert (difference["over"], difference["n"]) == ("seeds", 3)
    assert len(arms(run)["students"]) == 6


def test_killed_arm_goes_on_and_ends_with_the_same_weights(compared, recipe, images, teacher_folder, monkeypatch):
    run = compared(*OVERLAY, "--epochs", 3)
    weights = run / "arms" / "kd-0" / "student" / "model.safetensors"
    whole = weights.read_bytes()
    shutil.rmtree(run / "arms")
    save = Trainer.save_checkpoint

    def stop(self: Trainer) -> None:
        save(self)
        if self.label == "kd-0" and len(self.history) == 2:
            raise RunError("stopped by the test")

    options = [*tiny_run(images, "--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0)]
    options += ["--compare", *OVERLAY, "--epochs", 3]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", stop)
        assert recipe(*options).code == 1
    assert not weights.exists()
    before = files(run)
    outcome = recipe(*options)
    assert outcome.code == 2
    assert re.search(r"stage student of .*kd-0 was stopped half-way; add --resume", outcome.error)
    assert files(run) == before
    compared(*OVERLAY, "--epochs", 3, "--resume")
    assert weights.read_bytes() == whole
    assert "alone-0 student: complete, skipped" in compared.output


def test_longer_arm_gets_the_epochs_that_the_maps_cost(compared, trainings):
    run = compared(*OVERLAY, "--compare", "cost")
    assert trainings == ["student", "alone-0", "kd-0", "kd_longer-0"]
    (longer,) = [arm for arm in arms(run)["students"] if arm["arm"] == "kd_longer"]
    seconds = json.loads((run / ".stages" / "maps.json").read_text())["wall_time_s"]
    header, row = (run / "arms" / "kd-0" / "student_history.csv").read_text().splitlines()
    epoch = float(dict(zip(header.split(","), row.split(","), strict=True))["seconds"])
    assert 1 + seconds / epoch <= longer["epochs"] < 2 + seconds / epoch
    assert [d["baseline"] for d in arms(run)["differences"]] == ["alone", "kd", "kd_longer"]
    trainings.clear()
    compared(*OVERLAY, "--compare", "cost")
    assert trainings == []
    (run / "maps" / "provenance.json").unlink()
    slower = json.loads((run / ".stages" / "maps.json").read_text()) | {"wall_time_s": 100 * seconds}
    (run / ".stages" / "maps.json").write_text(json.dumps(slower))
    compared(*OVERLAY, "--compare", "cost")
    assert trainings == []


def test_an_arm_that_is_evaluated_again_needs_no_weights_to_start_from(compared, trainings, teacher_folder, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(teacher_folder / "model.safetensors", start)
    options = [
        *PLAIN,
        "--student",
        "test_resnet",
        "--student-init",
        "pretrained",
        "--student-checkpoint",
        start,
        "--student-args",
        "num_classes=2",
    ]
    run = compared(*options)
    start.unlink()
    (run / "arms" / "alone-0" / "metrics.json").unlink()
    trainings.clear()
    compared(*options)
    assert trainings == []
    assert (run / "arms" / "alone-0" / "metrics.json").exists()


def test_exchanged_weights_of_an_arm_are_refused(compared, recipe, images, teacher_folder):
    run = compared(*PLAIN)
    path = run / "arms" / "alone-0" / "student" / "model.safetensors"
    shutil.copy(run / "student" / "model.safetensors", path)
    teacher = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0]
    outcome = recipe(*tiny_run(images, *teacher, "--compare", *PLAIN))
    assert outcome.code == 2
    assert re.search(r"stage evaluate of .*alone-0 was made with other student than are there now", outcome.error)


def test_arms_of_a_truncated_teacher_start_from_its_weights_and_stored_logits_stay_with_kd():
    config = RunConfig(stored_logits=True, overlay_prob=0.0, distill_loss_weight=0.5, compare="arms")
    own, (alone, _) = arms_of(config)
    assert own.settings(config).needs_maps
    settings = alone.settings(config)
    assert (settings.needs_maps, settings.needs_live_teacher, settings.student_init) == (
        False,
        False,
        config.student_init,
    )


# ---- what people read ----


def test_page_and_card_open_with_the_verdict(compared):
    run = compared(*OVERLAY, report=True)
    page = (run / "report" / "index.html").read_text()
    opening = page[page.index("<h1>") : page.index("<nav")]
    sentence = "KD against the student alone: "
    assert opening.index("Was it worth it?") < opening.index(sentence) < opening.index("KD + overlay against KD: ")
    assert opening.index("One seed compares only these students") < opening.index("Wilson interval")
    assert page.index('<section id="arms">') < page.index('<section id="setup">')

    card = model_card(load_model(f"local-dir:{run / 'student'}"), "user/student", read_run(run))
    assert card.index("# student") < card.index(f"- {sentence}") < card.index("## Use")
    assert card.index(f"- {sentence}") < card.index("Wilson interval")
    assert f"\n{sentence}" in compared.output


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "--seeds", 0], "seeds must be at least 1, got 0"),
        (["--compare", "--seeds", 2], "needs 3 of them or more, got seeds 2; set seeds to 3, or to 1"),
        (["--compare", "none", "--seeds", 3], "add --compare, or drop them"),
        (["--compare", "--distill-loss-weight", 0], "compare asks what the teacher is worth"),
        (["--compare", "cost", "--overlay-prob", 0], "overlay_prob is 0; use --compare without cost"),
        (["--compare", "cost", "--teacher-epochs", 0, "--teacher-init", "pretrained", "--maps", "x"], "maps are given"),
        (["--compare", "costs"], "must be arms.cost.none, got 'costs' .did you mean 'cost'"),
    ],
)
def test_comparison_that_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        parse_config(RunConfig, [str(option) for option in options])
    assert "\n" not in str(error.value)
