"""`timm-igkd students`: what it says, what it writes, and what it refuses in one line."""

import importlib.util
from types import SimpleNamespace

import pytest
from command_lines import Runner
from students_parts import SIDE, file, say_latency

from timm_igkd.cli.students_command import pareto_front, pareto_picture
from timm_igkd.export.budget import Budget
from timm_igkd.export.students import MeasuredStudent, read_students

pytest.importorskip("onnxruntime")
TEACHER = ("--teacher", "test_resnet", "--img-size", SIDE, "--num-classes", 10)


def test_students_are_listed_with_the_command_that_distils_the_best(command: Runner, monkeypatch):
    say_latency(monkeypatch)
    outcome = command("students", *TEACHER, "--max-latency-ms", 2, "--int8")
    assert outcome.code == 0, outcome.error
    lines = outcome.output.splitlines()
    assert " measured students fit 2 ms (test_resnet at 32 px" in lines[0]
    assert any(line.startswith("test_resnet without its last 1 ") and " int8 " in line for line in lines)
    assert any(line.startswith("teacher test_resnet ") for line in lines)
    assert lines[-1].startswith("the best by the rule: timm-igkd distill --teacher test_resnet --student")


def test_record_and_picture_are_written_where_asked_for(command: Runner, tmp_path, monkeypatch):
    say_latency(monkeypatch)
    out = tmp_path / "new" / "students"
    assert command("students", *TEACHER, "--max-latency-ms", 2, "--out", out).code == 0
    record = read_students(out / "students.json")
    assert (record.teacher, record.budget) == ("test_resnet", Budget(2.0))
    picture = (out / "students.svg").read_text()
    assert picture.startswith("<svg xmlns=")
    assert "var(--" not in picture
    for student in pareto_front(record):
        assert str(student) in picture
    assert sorted(path.name for path in out.iterdir()) == ["students.json", "students.svg"]


def test_none_that_fits_ends_with_2_and_the_nearest(command: Runner, tmp_path, monkeypatch):
    say_latency(monkeypatch)
    outcome = command("students", *TEACHER, "--max-latency-ms", 1e-6, "--out", tmp_path / "students")
    assert outcome.code == 2
    assert "no student of test_resnet at 32 px fits 1e-06 ms" in outcome.error
    assert "<svg" in (tmp_path / "students" / "students.svg").read_text()


def test_no_cache_measures_again(command: Runner, monkeypatch):
    asked = []

    def measure_files(model, *, int8, use_cache, folder):
        asked.append(use_cache)
        return (file(1.0),), False

    say_latency(monkeypatch)
    monkeypatch.setattr("timm_igkd.export.students.measure_files", measure_files)
    for flags, use_cache in (([], {True}), (["--no-cache"], {False})):
        asked.clear()
        assert command("students", *TEACHER, "--max-latency-ms", 2, *flags).code == 0
        assert set(asked) == use_cache


def test_front_has_no_student_that_a_faster_one_outweighs():
    times = {4: 1.0, 3: 2.0, 9: 3.0, 8: 3.0}
    students = [MeasuredStudent("resnet18", 0, True, size, 1, (file(ms),), False) for size, ms in times.items()]
    front = pareto_front(SimpleNamespace(students=students, budget=Budget(5.0)))
    assert [student.num_parameters for student in front] == [4, 9]


@pytest.mark.parametrize("name", [r"local-dir:/data/$\x$/t", "local-dir:/data/$run$/t", "a$b"])
def test_name_with_dollars_is_drawn_as_it_is(name):
    student = MeasuredStudent(name, 0, True, 4, 1, (file(1.0),), False)
    drawn = pareto_picture(SimpleNamespace(students=[student], others=[], measured_teacher=None, budget=Budget(5.0)))
    assert str(student) in drawn


REFUSED = {
    "no budget": ([], "students are chosen for a budget, got none; give --max-latency-ms X or --max-size-mb X"),
    "int8 alone": (["--int8"], "students are chosen for a budget, got none"),
    "no time": (["--max-latency-ms", 0], "max_latency_ms must be above 0 and finite, got 0"),
    "a size below 0": (["--max-size-mb", -1], "max_size_mb must be above 0 and finite, got -1"),
    "no class": (["--max-size-mb", 1, "--num-classes", 0], "num_classes must be at least 1, got 0"),
    "no input size": (["--max-size-mb", 1, "--img-size", 0], "img_size must be at least 1, got 0"),
    "an unknown teacher": (["--max-size-mb", 1, "--teacher", "resnet5x"], "unknown model 'resnet5x'"),
    "weights, which take no time": (["--max-size-mb", 1, "--teacher-checkpoint", "x"], "unknown argument"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_end_with_2_and_one_line_before_anything_is_measured(case, command: Runner, monkeypatch):
    monkeypatch.setattr("timm_igkd.export.students.measure_files", None)
    options, message = REFUSED[case]
    outcome = command("students", *TEACHER, *options)
    assert outcome.code == 2
    assert message in outcome.error


def test_picture_that_would_replace_a_folder_ends_with_2(command: Runner, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_igkd.export.students.measure_files", None)
    (tmp_path / "students.svg").mkdir()
    outcome = command("students", *TEACHER, "--max-size-mb", 1, "--out", tmp_path)
    assert (outcome.code, "students.svg' is a folder" in outcome.error) == (2, True)


@pytest.mark.parametrize("missing", ["onnx", "matplotlib"])
def test_missing_extra_ends_with_2_and_one_line(missing, command: Runner, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" == missing else find(name))
    if missing == "matplotlib":
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    outcome = command("students", *TEACHER, "--max-size-mb", 1, "--out", tmp_path / "students")
    assert outcome.code == 2
    remedy = {"onnx": "'timm-igkd[onnx]'", "matplotlib": "the picture of --out needs matplotlib"}[missing]
    assert remedy in outcome.error
