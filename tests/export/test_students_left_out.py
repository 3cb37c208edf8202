"""Students that cannot be measured: named and left out; what the machine raises ends the search."""

import pytest
from students_parts import TEACHER, find, say_latency

from timm_igkd.errors import InputError
from timm_igkd.export import students
from timm_igkd.export.budget import Budget
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
