"""What a student costs against its teacher: one run's numbers, and the machine that they hold for."""

import pytest
from study_parts import add_rows, edit_rows, primary_study, write_rows

from studies.cost import cost_against_teacher
from studies.results import StudyResults
from studies.rows import StudyRows


def test_cost_is_told_against_the_teachers(tmp_path):
    config = primary_study(tmp_path, seeds=1)
    add_rows(config)
    assert cost_against_teacher(StudyResults.read(config)) == []
    measured = {"macs": 2e6, "teacher_macs": 3e6, "latency_ms_1": 5, "teacher_latency_ms_1": 10, "latency_ms_64": 20}
    measured |= {"teacher_latency_ms_64": 80, "latency_threads": 2}
    edit_rows(tmp_path, lambda row: row.update(measured))
    sentence, paper = cost_against_teacher(StudyResults.read(config))
    for part in (
        "543,498 parameters",
        "1.5× fewer",
        "5\u202fms against 10\u202fms (2.0× faster)",
        "(4.0× faster)",
        "2 threads",
    ):
        assert part in sentence
    assert "cold" in paper
    edit_rows(tmp_path, lambda row: row.update(num_parameters=106_778))
    assert len(cost_against_teacher(StudyResults.read(config))) == 1


def test_a_latency_stands_beside_the_machine_that_measured_it(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    measured = {"macs": 2e6, "teacher_macs": 3e6, "latency_ms_64": 20, "teacher_latency_ms_64": 80}
    measured |= {"teacher_latency_ms_1": 10, "latency_threads": 2}

    def measure(row):
        row.update(measured, hardware=f"machine {row['seed']}", latency_ms_1=5 + int(row["seed"]))

    edit_rows(tmp_path, measure)
    backwards = StudyRows(tmp_path).read()[::-1]
    write_rows(tmp_path / "results.csv", backwards)
    sentence, _ = cost_against_teacher(StudyResults.read(config))
    assert "machine 0" in sentence
    assert "one image 5\u202fms" in sentence
    for lost in ("latency_ms_1", "top1"):  # not measured, or failed: the other run's stands, with its own machine
        write_rows(tmp_path / "results.csv", [row | ({lost: ""} if row["seed"] == "0" else {}) for row in backwards])
        edit_rows(tmp_path, lambda row: row.update(diverged_epoch="" if row["top1"] else 1))
        sentence, _ = cost_against_teacher(StudyResults.read(config))
        assert "machine 1" in sentence
        assert "one image 6\u202fms" in sentence


@pytest.mark.parametrize("lost", ["hardware", "latency_threads", "latency_ms_64", "teacher_macs", "latency_ms_1"])
def test_a_cost_of_which_a_part_is_not_known_is_not_told(tmp_path, lost):
    config = primary_study(tmp_path, seeds=1)
    add_rows(config)
    both = {"macs": 2e6, "latency_ms_1": 5, "latency_ms_64": 20}
    measured = both | {f"teacher_{name}": 2 * value for name, value in both.items()} | {"latency_threads": 2}
    edit_rows(tmp_path, lambda row: row.update(measured | {lost: ""}))
    assert cost_against_teacher(StudyResults.read(config)) == []
