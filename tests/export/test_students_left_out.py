"""Students that cannot be measured, or are none: named and left out, with a remedy; what the machine raises ends it."""

from dataclasses import replace

import pytest
from students_parts import TEACHER, file, find, say_latency

from timm_igkd.errors import InputError, RunError
from timm_igkd.evaluation.latency import Timing
from timm_igkd.export import students
from timm_igkd.export.budget import Budget
from timm_igkd.export.student_latency import StudentFile
from timm_igkd.models.loading import count_macs

pytest.importorskip("onnxruntime")


def test_what_cannot_be_measured_is_left_out_with_its_reason(monkeypatch):
    say_latency(monkeypatch, failing="lcnet_035")
    record = find(Budget(100.0))
    assert dict(record.left_out) == {"lcnet_035": "onnxruntime cannot run it"}
    assert "lcnet_035" not in {s.name for s in (*record.students, *record.others)}


def test_whatever_a_candidate_raises_it_is_left_out_alone(monkeypatch):
    say_latency(monkeypatch)

    def raise_its_own(model):
        if model.pretrained_cfg["architecture"] == "lcnet_035":
            raise IndexError("index 23 is out of bounds\nand more")
        return count_macs(model)

    monkeypatch.setattr(students, "count_macs", raise_its_own)
    record = find(Budget(100.0))
    assert dict(record.left_out) == {"lcnet_035": "index 23 is out of bounds"}
    assert len(record.students) > 3


def test_what_the_machine_raises_ends_the_search(monkeypatch):
    say_latency(monkeypatch)
    for error in (OSError("no space left"), MemoryError()):

        def fail(model, error=error):
            raise error

        monkeypatch.setattr(students, "count_macs", fail)
        with pytest.raises(type(error)):
            find(Budget(100.0))


def test_where_nothing_could_be_measured_the_first_reason_is_told(monkeypatch):
    say_latency(monkeypatch)

    def fail(model):
        raise IndexError("index 23 is out of bounds")

    monkeypatch.setattr(students, "count_macs", fail)
    with pytest.raises(InputError, match=r"none could be measured: .* \(index 23 is out of bounds\)"):
        find(Budget(100.0)).best()


def test_teacher_that_cannot_be_measured_hinders_nothing(monkeypatch):
    say_latency(monkeypatch, failing=TEACHER)
    record = find(Budget(100.0))
    assert record.measured_teacher is None
    assert record.students


def test_only_students_count_as_tried_and_are_named_where_nothing_could_be_measured(monkeypatch):
    say_latency(monkeypatch)

    def fail(model):
        raise IndexError(f"no {model.pretrained_cfg['architecture']}")

    monkeypatch.setattr(students, "measure_files", lambda model, **options: fail(model))
    record = find(Budget(100.0))
    assert TEACHER in record.left_out
    with pytest.raises(InputError, match=r"5 of 5 smaller ones were tried; none could be measured: (?!resnet10t \()"):
        record.best()


def test_a_student_that_cannot_be_measured_anew_is_left_out_and_counted_once(monkeypatch):
    def measure(model, *, int8, use_cache, folder):
        if not use_cache and folder.name.startswith("lcnet_035"):
            raise RunError("onnxruntime cannot run it")
        return (file(99.0),), use_cache

    say_latency(monkeypatch)
    monkeypatch.setattr(students, "measure_files", measure)
    record = find(Budget(1.0))
    assert dict(record.left_out) == {"lcnet_035": "onnxruntime cannot run it"}
    assert [str(student) for student in record.others].count("lcnet_035") == 0
    with pytest.raises(InputError, match="5 of 5 smaller ones were tried; the fastest"):
        record.best()


def why_none(budget: Budget, **options: object) -> str:
    with pytest.raises(InputError) as raised:
        find(budget, **options).best()
    return str(raised.value)


def test_smaller_ones_are_counted_whatever_the_size_allowed(monkeypatch):
    asked = say_latency(monkeypatch)
    record = find(Budget(max_size_mb=1e-3))
    sizes = [4e-6 * student.num_parameters for student in find(Budget(100.0)).students]
    least = min(sizes)
    assert (asked[0], record.candidates, record.students, record.others) == ("resnet10t", 5, (), ())
    why = why_none(Budget(max_size_mb=1e-3))
    assert f"fits 0.001 MB: the smallest of 5 smaller ones, {record.smallest}, takes about {least:.3g} MB; " in why
    assert why.endswith("raise the budget")
    fitting = find(Budget(max_size_mb=1.5 * least))
    assert 0 < len(fitting.students) < fitting.candidates == 5


def test_int8_takes_a_quarter_of_the_size_that_is_named(monkeypatch):
    say_latency(monkeypatch)
    smallest = find(Budget(100.0)).smallest
    why = why_none(Budget(max_size_mb=1e-3, int8=True))
    assert f"takes about {1e-6 * smallest.num_parameters:.3g} MB" in why


def test_a_latency_of_seconds_is_told_without_powers_of_ten():
    file = StudentFile("onnx", 1234.5, Timing(1234.5, 1300.0, 20))
    assert file.cost() == "1,234 ms in 1,234 MB"
    assert replace(file, size_mb=0.5804).cost() == "1,234 ms in 0.58 MB"


@pytest.mark.parametrize(
    ("budget", "nearest", "helps"),
    [
        (Budget(max_size_mb=1000), "the smallest", False),
        (Budget(1e-9), "the fastest", True),
        (Budget(1e-9, 1000), "the fastest", True),
    ],
)
def test_smaller_images_are_offered_where_time_is_short(monkeypatch, budget, nearest, helps):
    say_latency(monkeypatch)
    monkeypatch.setattr(students, "measure_files", lambda model, **options: ((file(9.0, 2e3),), False))
    why = why_none(budget)
    assert f"5 of 5 smaller ones were tried; {nearest}, " in why
    assert ("choose a smaller --img-size" in why) is helps


def test_smaller_images_are_no_remedy_where_nothing_is_small_enough(monkeypatch):
    say_latency(monkeypatch)
    assert "--img-size" not in why_none(Budget(100.0, 1e-3))


def test_where_nothing_smaller_is_known_no_budget_would_help(monkeypatch):
    say_latency(monkeypatch)
    monkeypatch.setattr("timm_igkd.export.candidates.truncations", lambda *arguments: [])
    why = why_none(Budget(100.0), architectures=[])
    assert why.endswith("none is known that is smaller; choose a larger teacher, or name the student")
