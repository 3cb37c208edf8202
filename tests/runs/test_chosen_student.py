"""`distill --student auto`: the run chooses its student for a budget, once, and names it."""

import re

import pytest
from command_lines import Runner, tiny_run, two_splits
from students_parts import SIDE, TABLE, file, say_latency

from timm_igkd.errors import InputError
from timm_igkd.export.students import MeasuredStudent, StudentsRecord, read_students
from timm_igkd.runs.folder import with_student
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training.trainer import Trainer

AUTO = ("--student", "auto", "--max-latency-ms", 2)


@pytest.fixture
def images(tiny_images):
    return two_splits(tiny_images)


@pytest.fixture(autouse=True)
def _untrained(monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: self.history_path.touch())
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)


def run(recipe, images, *options):
    return recipe(*tiny_run(images, "--overlay-prob", 0, "--img-size", SIDE, *options))


def config_of(tmp_path) -> RunConfig:
    return parse_config(RunConfig, ["--config", str(tmp_path / "runs" / "run" / "config.yaml")])


def test_settings_name_the_student_that_was_chosen(recipe: Runner, images, tmp_path, monkeypatch):
    say_latency(monkeypatch)
    outcome = run(recipe, images, *AUTO)
    assert outcome.code == 0, outcome.error
    record, config = read_students(tmp_path / "runs" / "run" / "students.json"), config_of(tmp_path)
    best = record.best()
    assert (config.student, config.student_drop) == ((None, best.drop) if best.drop else (best.name, 2))
    assert (config.max_latency_ms, config.img_size, record.num_classes) == (None, SIDE, 2)
    assert f"student: {best}, the best of {len(record.students)} that fit 2 ms; its onnx file takes" in outcome.output


def test_resume_does_not_choose_again(recipe: Runner, images, tmp_path, monkeypatch):
    say_latency(monkeypatch)
    assert run(recipe, images, *AUTO).code == 0
    chosen = config_of(tmp_path)
    say_latency(monkeypatch, slower={"igkd_truncated": 1e3, "lcnet_035": 1e3})
    monkeypatch.setattr("timm_igkd.runs.folder.find_students", None)
    (tmp_path / "runs" / "run" / ".stages" / "evaluate.json").unlink()
    outcome = run(recipe, images, *AUTO, "--resume")
    assert outcome.code == 0, outcome.error
    assert config_of(tmp_path).student == chosen.student
    assert "student: complete, skipped" in outcome.output


def test_other_budget_in_the_same_folder_is_refused(recipe: Runner, images, monkeypatch):
    say_latency(monkeypatch)
    assert run(recipe, images, *AUTO).code == 0
    outcome = run(recipe, images, "--student", "auto", "--max-latency-ms", 3)
    assert outcome.code == 2
    assert "is a choice for 2 ms of test_resnet at 32 px, not for the settings of now" in outcome.error


def test_named_architecture_starts_from_its_weights_or_is_told_to_be_random(
    recipe: Runner, images, tmp_path, monkeypatch
):
    say_latency(monkeypatch)
    monkeypatch.setattr("timm_igkd.export.candidates.read_architectures", lambda: TABLE[2:3])
    monkeypatch.setattr("timm_igkd.export.students.candidates", only_table)
    outcome = run(recipe, images, *AUTO, "--student-init", "random")
    assert outcome.code == 0, outcome.error
    config = config_of(tmp_path)
    assert (config.student, config.student_init) == ("lcnet_035", "random")


def only_table(*arguments):
    from timm_igkd.export.candidates import candidates

    return [candidate for candidate in candidates(*arguments) if not candidate.drop]


def test_none_that_fits_ends_before_anything_is_written(recipe: Runner, images, tmp_path, monkeypatch):
    say_latency(monkeypatch, 1.0)
    outcome = run(recipe, images, *AUTO)
    assert outcome.code == 2
    assert re.search(r"no student of test_resnet at 32 px fits 2 ms: .* raise the budget", outcome.error)
    assert not (tmp_path / "runs" / "run").exists()


def test_none_that_is_small_enough_is_told_without_a_remedy_that_cannot_help(recipe: Runner, images, monkeypatch):
    say_latency(monkeypatch)
    outcome = run(recipe, images, "--student", "auto", "--max-size-mb", 1e-3)
    assert outcome.code == 2
    assert re.search(
        r"fits 0.001 MB: the smallest of \d+ smaller ones, .* MB; raise the budget$", outcome.error.strip()
    )


@pytest.mark.parametrize(("export", "int8"), [((), False), (("onnx",), False), (("onnx-int8",), True)])
def test_int8_counts_where_the_run_exports_it(export, int8):
    assert RunConfig(student="auto", max_latency_ms=5.0, export=export).budget().int8 is int8


def resolved(drop: int = 0, **settings: object) -> RunConfig:
    """Return the settings with a student in the place of auto, measured at 96 px."""
    best = MeasuredStudent("resnet18.a1_in1k", drop, True, 1, 1, (file(1.0),), False)
    config = RunConfig(**{"student": "auto", "max_latency_ms": 5.0, **settings})
    record = StudentsRecord("t", 96, 10, True, config.budget(), None, (best,), (), {}, 1, 1.0, {})
    return with_student(config, record)


def test_an_architecture_takes_the_place_of_auto_at_the_size_that_was_measured():
    config = resolved(teacher_init="pretrained")
    assert (config.student, config.img_size) == ("resnet18.a1_in1k", 96)
    assert (config.max_latency_ms, config.max_size_mb) == (None, None)


@pytest.mark.parametrize(("asked", "init"), [("pretrained", "teacher"), ("random", "random")])
def test_a_truncation_takes_the_place_of_auto(asked, init):
    config = resolved(drop=3, student_init=asked)
    assert (config.student, config.student_drop, config.student_init) == (None, 3, init)


@pytest.mark.parametrize(("teacher", "student", "size"), [("random",) * 2 + (None,), ("random", "pretrained", 96)])
def test_two_random_starts_read_images_at_their_own_size(teacher, student, size):
    assert resolved(teacher_init=teacher, student_init=student).img_size == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": "auto"}, "for a budget, got none; give --max-latency-ms X or --max-size-mb X"),
        ({"student": "auto", "max_latency_ms": 0.0}, "max_latency_ms must be above 0 and finite, got 0"),
        ({"student": "test_resnet", "max_latency_ms": 5.0}, "max_latency_ms is for a student that is to be chosen"),
        ({"student": None, "max_size_mb": 5.0}, "max_size_mb is for a student that is to be chosen"),
        ({"student": "auto", "max_size_mb": 1.0, "student_args": {"drop_rate": 0.1}}, "student is auto: drop it"),
        ({"student": "auto", "max_size_mb": 1.0, "student_drop": 3}, "student_drop 3 is for a truncated teacher"),
        ({"student": "auto", "max_size_mb": 1.0, "student_init": "teacher"}, "student_init teacher is for a truncated"),
    ],
)
def test_settings_that_do_not_go_with_a_choice_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        RunConfig(**options)
