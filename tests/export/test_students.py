"""Students for a budget: measured, ordered, kept in a cache and told of in one record."""

import json
import re
import time

import pytest
import timm
import torch
from export_parts import write_graph
from students_parts import SIDE, TABLE, TEACHER, file, find, say_latency, tiny

from timm_igkd.environment import environment
from timm_igkd.errors import InputError
from timm_igkd.evaluation import onnx_file
from timm_igkd.evaluation.latency import Timing
from timm_igkd.export import student_latency, students
from timm_igkd.export.budget import Budget
from timm_igkd.export.candidates import Candidate, rank
from timm_igkd.export.student_latency import cache_folder, measure_files, time_again
from timm_igkd.export.students import MeasuredStudent, find_students, read_students
from timm_igkd.files import read_mapping
from timm_igkd.models.loading import count_macs
from timm_igkd.records import write_record

pytest.importorskip("onnxruntime")


def test_students_that_fit_come_best_first_and_others_fastest_first(monkeypatch):
    say_latency(monkeypatch, 1e-6)
    record = find(Budget(1.3))
    assert {str(s) for s in (*record.students, *record.others)} >= {"test_convnext.r160_in1k", "lcnet_035"}
    assert list(record.students) == sorted(record.students, key=rank, reverse=True)
    assert all(s.files[0].latency_ms.median <= 1.3 for s in record.students)
    slow = [s.fastest.latency_ms.median for s in record.others]
    assert slow == sorted(slow)
    assert len(set(slow)) > 1
    assert slow[0] > 1.3
    assert record.best() is record.students[0]
    assert record.students[0].has_weights


def test_random_starts_make_pretrained_weights_no_advantage(monkeypatch):
    say_latency(monkeypatch)
    found = find(Budget(100.0), use_weights=False).students
    assert not any(student.has_weights for student in found)
    sizes = [student.num_parameters for student in found]
    assert sizes == sorted(sizes, reverse=True)


def test_the_faster_file_within_the_limits_counts():
    files = (file(1.0, 4.0), file(2.0, 1.0, "onnx-int8"))
    student = MeasuredStudent("resnet18", 0, True, 1, 1, files, False)
    assert student.best(Budget(3.0, int8=True)).format == "onnx"
    assert student.best(Budget(3.0, 2.0, int8=True)).format == "onnx-int8"
    assert student.best(Budget(1.5, 2.0, int8=True)) is None
    assert student.fastest.format == "onnx"


def test_at_most_so_many_are_measured(monkeypatch):
    asked = say_latency(monkeypatch)
    monkeypatch.setattr(students, "MOST_MEASURED", 2)
    record = find(Budget(100.0))
    assert (len(asked), len(record.students), record.candidates) == (1 + 2, 2, 5)


def test_no_student_is_begun_that_might_end_after_the_time(monkeypatch):
    asked = say_latency(monkeypatch)
    monkeypatch.setattr(students, "MOST_SECONDS", 10.0)
    monkeypatch.setattr(students.time, "monotonic", lambda: 3.0 * len(asked))  # each takes three seconds
    record = find(Budget(100.0))
    assert (len(asked), record.seconds) == (1 + 3, 12.0)


def test_a_slow_teacher_takes_no_time_away_from_its_students(monkeypatch):
    asked = say_latency(monkeypatch)
    monkeypatch.setattr(students, "MOST_SECONDS", 10.0)
    monkeypatch.setattr(students.time, "monotonic", lambda: 100.0 * bool(asked) + 3.0 * len(asked))
    again = []
    monkeypatch.setattr(students, "AGAIN_S", 0.0)
    monkeypatch.setattr(students, "REPEATS", 2)
    monkeypatch.setattr(students, "time_again", lambda folder: again.append(folder) or (file(1.0),))
    find(Budget(100.0))
    assert len(asked) == 1 + 3
    assert len(again) == 2 * 3 + 2


def test_none_that_fits_is_one_line_with_the_nearest(monkeypatch):
    say_latency(monkeypatch)
    record = find(Budget(1e-9))
    with pytest.raises(
        InputError, match=r"no student of resnet10t at 32 px fits 1e-09 ms: 5 of 5 smaller ones.*takes"
    ) as raised:
        record.best()
    assert f"the fastest, {min(record.others, key=lambda s: s.fastest.latency_ms.median)}, takes" in str(raised.value)
    assert len(record.others) == 5


def test_teacher_that_reads_no_squares_of_colour_is_refused():
    grey = timm.create_model("test_resnet", in_chans=1).eval()
    with pytest.raises(InputError, match="squares of 3 channels, resnet10t reads 1 x 160 x 160; give --img-size"):
        find_students(grey, Budget(1.0), teacher_name=TEACHER)


def test_record_comes_back_equal(tmp_path, monkeypatch):
    say_latency(monkeypatch)
    record = find(Budget(1.0, 5.0, int8=True), num_classes=3)
    write_record(tmp_path / "students.json", record)
    assert read_students(tmp_path / "students.json") == record
    assert (record.num_classes, record.img_size, record.teacher) == (3, SIDE, TEACHER)
    names = ["name", "drop", "has_weights", "num_parameters", "macs", "files", "cached"]
    assert list(read_mapping(tmp_path / "students.json")["measured_teacher"]) == names


def test_damaged_record_is_one_line(tmp_path):
    (tmp_path / "students.json").write_text(json.dumps({"teacher": "me"}))
    with pytest.raises(InputError, match=r"students\.json' lacks 'img_size'"):
        read_students(tmp_path / "students.json")


# ---- measuring -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Return the names of the networks that are exported; nothing is cached yet."""
    written = []
    write = student_latency._write_quickly
    monkeypatch.setattr(student_latency, "TIMING_S", 0.0)
    monkeypatch.setattr(
        student_latency, "_write_quickly", lambda model, *args: (written.append(type(model)), write(model, *args))
    )
    for path in cache_folder().glob("*.json"):
        path.unlink()
    return written


def test_float_and_int8_files_are_measured(quick):
    (floats, int8), cached = measure_files(tiny("test_resnet"), int8=True)
    assert (floats.format, int8.format, cached) == ("onnx", "onnx-int8", False)
    assert int8.size_mb < 0.5 * floats.size_mb
    assert min(floats.latency_ms.median, int8.latency_ms.median) > 0
    assert floats.latency_ms.n >= 5


def test_measured_latency_is_kept_and_measured_again_where_asked_for(quick):
    first = measure_files(tiny("test_resnet"), int8=False)
    again = measure_files(tiny("test_resnet"), int8=False)
    assert again == (first[0], True)
    assert len(quick) == 1
    assert measure_files(tiny("test_resnet"), int8=False, use_cache=False)[1] is False
    assert len(quick) == 2


def test_of_several_timings_the_lowest_median_stands_in_the_cache_too(quick, monkeypatch, tmp_path):
    medians = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(student_latency, "time_files", lambda paths, **_: [Timing(next(medians), 9.0, 5)] * len(paths))
    measure_files(tiny("test_resnet"), int8=False, folder=tmp_path)
    for expected in (2.0, 2.0):
        (file,) = time_again(tmp_path)
        assert file.latency_ms.median == expected
    assert measure_files(tiny("test_resnet"), int8=False) == ((file,), True)


def test_students_are_timed_again_in_turn_but_for_cached_ones_and_the_time(monkeypatch):
    asked = []

    def measure(model, *, int8, use_cache, folder):
        return (file(2.0),), folder.name.startswith("test_vit")

    def again(folder):
        asked.append(folder.name)
        return (file(1.0),)

    say_latency(monkeypatch)
    monkeypatch.setattr(students, "REPEATS", 2)
    monkeypatch.setattr(students, "measure_files", measure)
    monkeypatch.setattr(students, "time_again", again)
    record = find(Budget(1.5))
    assert {student.fastest.latency_ms.median for student in record.students} == {1.0}
    listed = [f"{student.name}-{student.drop}" for student in record.students]
    assert sorted(asked) == sorted([*listed, f"{TEACHER}-0"] * 2)
    assert asked[: len(listed)] == asked[len(listed) : 2 * len(listed)]
    monkeypatch.setattr(students, "MOST_SECONDS", 0.0)
    asked.clear()
    assert find(Budget(1.5)).measured_teacher.fastest.latency_ms.median == 2.0
    assert asked == []


@pytest.mark.parametrize("times_slower", [60.0, 1.5])
def test_what_a_busy_machine_left_in_the_cache_is_measured_anew_before_nothing_fits(monkeypatch, times_slower):
    asked = []

    def measure(model, *, int8, use_cache, folder):
        latency = 1e-6 * count_macs(model)
        asked.append((folder.name, use_cache))
        return (file(latency * (times_slower if use_cache else 1)),), use_cache

    say_latency(monkeypatch)
    monkeypatch.setattr(students, "measure_files", measure)
    quiet = find(Budget(1.5), use_cache=False)
    asked.clear()
    record = find(Budget(1.5))
    assert [str(student) for student in record.students] == [str(student) for student in quiet.students]
    anew = [name for name, use_cache in asked if not use_cache]
    assert anew
    assert len(set(anew)) == len(anew)
    assert ("as measured before" in record.choice()) == record.best().cached


def test_a_cached_student_far_over_the_budget_is_left_where_others_fit(monkeypatch):
    def measure(model, *, int8, use_cache, folder):
        assert use_cache
        return (file(0.5 if folder.name.startswith("test_vit") else 99.0),), True

    say_latency(monkeypatch)
    monkeypatch.setattr(students, "measure_files", measure)
    monkeypatch.setattr(
        students,
        "_measure_in_turn",
        lambda chooser, bench, most, progress: [
            bench.measure(Candidate(name, 0, False, 0, 0)) for name in ("test_vit", "test_resnet")
        ],
    )
    record = find(Budget(1.0))
    assert [str(student) for student in record.students] == ["test_vit"]
    assert record.choice().endswith("ms in 1 MB, as measured before")


def test_a_limit_of_size_alone_times_nothing_anew(monkeypatch):
    def measure(model, *, int8, use_cache, folder):
        assert use_cache
        return (file(1.0, 9.0),), True

    say_latency(monkeypatch)
    monkeypatch.setattr(students, "measure_files", measure)
    record = find(Budget(max_size_mb=5.0))
    assert record.others
    assert not record.students
    assert not record.left_out


class Windowed(torch.nn.Module):
    """Layers of equal names; what its windows are only its buffers tell."""

    def __init__(self, window, architecture="windowed", persistent=True):
        super().__init__()
        self.register_buffer("index", torch.zeros(window, window), persistent=persistent)
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "architecture": architecture}


@pytest.mark.parametrize("persistent", [True, False])
def test_networks_of_the_same_layers_are_told_apart(persistent):
    keys = [
        json.dumps(student_latency._key(model, ("onnx",)))
        for model in (
            Windowed(8, persistent=persistent),
            Windowed(16, persistent=persistent),
            Windowed(8, "other", persistent=persistent),
        )
    ]
    assert len(set(keys)) == 3
    assert keys[0] == json.dumps(student_latency._key(Windowed(8, persistent=persistent), ("onnx",)))


@pytest.mark.parametrize(
    "other", ["classes", "size", "int8", "onnxruntime", "onnxscript", "timm_igkd", "cpu", "processor"]
)
def test_other_network_format_package_or_processor_is_measured_anew(other, quick, monkeypatch):
    measure_files(tiny("test_resnet"), int8=False)
    model, int8 = tiny("test_resnet", classes=11 if other == "classes" else 10), other == "int8"
    if other == "size":
        model.pretrained_cfg["input_size"] = (3, 48, 48)
    if other in onnx_file.PACKAGES:
        versions = onnx_file.onnx_versions() | {other: "0"}
        monkeypatch.setattr(student_latency, "onnx_versions", lambda: versions)
    if other in ("timm_igkd", "cpu"):
        found = environment() | {other: "another"}
        monkeypatch.setattr(student_latency, "environment", lambda: found)
    if other == "processor":
        monkeypatch.setattr(student_latency, "processor", lambda: "family 25, model 17")
    assert measure_files(model, int8=int8)[1] is False


def test_folders_of_students_are_apart_and_short_whatever_their_names(tmp_path):
    bench = students._Bench(tiny("test_resnet"), 10, SIDE, False, False, tmp_path)
    names = "local-dir:/" + "x" * 400, "x/y", "x_y"
    folders = {bench._folder(Candidate(name, drop, False, 1, 1)) for name in names for drop in (0, 1)}
    assert len(folders) == 6
    assert all(len(folder.name) <= 100 for folder in folders)


def test_damaged_entry_is_measured_again(quick):
    measure_files(tiny("test_resnet"), int8=False)
    (path,) = cache_folder().glob("*.json")
    path.write_text("{")
    assert measure_files(tiny("test_resnet"), int8=False)[1] is False
    assert measure_files(tiny("test_resnet"), int8=False)[1] is True


def test_cache_that_cannot_be_written_costs_nothing_but_time(quick, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(student_latency, "cache_folder", lambda: tmp_path / "file")
    assert measure_files(tiny("test_resnet"), int8=False)[1] is False
    assert "measured latencies are not kept" in caplog.text


def test_quick_file_has_its_constants_folded_as_an_export_has(quick, tmp_path):
    """Else int8 takes several times as long: biases that are shared, and bounds that are nodes, are not fused."""
    import onnx

    student_latency._write_quickly(tiny("test_efficientnet"), torch.rand(1, 3, SIDE, SIDE), tmp_path / "quick.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "quick.onnx").graph.node}
    assert not kinds & {"Constant", "Identity", "BatchNormalization"}
    assert "Conv" in kinds


def test_older_exporter_that_is_gone_is_replaced_by_the_exports_own(quick, monkeypatch):
    def gone(*args, **options):
        raise ValueError("dynamo=False is gone")

    monkeypatch.setattr(student_latency.torch.onnx, "export", gone)
    monkeypatch.setattr(student_latency, "write_onnx", lambda model, path: write_graph(path, size=SIDE))
    ((found,), _) = measure_files(tiny("test_resnet"), int8=False)
    assert found.latency_ms.n >= 5


def test_two_students_are_really_measured(quick, monkeypatch):
    monkeypatch.setattr("timm_igkd.export.candidates.read_architectures", lambda: TABLE[:1])
    monkeypatch.setattr(students, "MOST_MEASURED", 1)
    before = time.monotonic()
    record = find(Budget(1000.0))
    (student,) = record.students
    assert re.match("test_convnext|resnet10t", student.name)
    assert 0 < record.seconds <= time.monotonic() - before + 0.1
    assert record.environment["onnxruntime"]
