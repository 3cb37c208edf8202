"""Where the models of a run started, as the page says it, the card's license and the Hub's base models."""

import pytest

from timm_igkd.report.card import base_models
from timm_igkd.report.licenses import license_of_start
from timm_igkd.report.run_facts import start_of

TEACHER, STUDENT = "timm/resnet18.a1_in1k", "timm/resnet10t.c3_in1k"
TRAINED, RANDOM, CHECKED = {"teacher_epochs": 3}, {"teacher_init": "random"}, {"teacher_checkpoint": "t.pth"}
FINE_TUNED = TRAINED | {"teacher_init": "pretrained"}


@pytest.mark.parametrize(
    ("config", "words", "license", "bases"),
    [
        ({}, "its pretrained weights", "mit", [TEACHER]),
        ({"teacher_init": "pretrained"}, "its pretrained weights", "mit", [TEACHER]),
        (CHECKED, "the weights of a checkpoint", "unknown", []),
        (TRAINED, "random weights", "apache-2.0", []),
        (TRAINED | RANDOM, "random weights", "apache-2.0", []),
        (FINE_TUNED, "its pretrained weights", "mit", []),
        (FINE_TUNED | CHECKED, "the weights of a checkpoint", "unknown", []),
    ],
)
def test_a_teacher_is_given_or_trained_from_somewhere(config, words, license, bases):
    config = {"teacher": "resnet18", "teacher_epochs": 0} | config
    assert start_of(config, "teacher") == words
    assert license_of_start({"license": "mit"}, config, "teacher") == license
    assert base_models(config, uses_teacher=True) == bases
    truncated = config | {"student_init": "teacher"}
    assert start_of(truncated, "student") == "the weights of the teacher's kept layers"
    assert license_of_start({"license": "mit"}, truncated) == license
    assert base_models(truncated, uses_teacher=True) == bases


@pytest.mark.parametrize(
    ("config", "words", "license", "bases"),
    [
        ({}, "random weights", "apache-2.0", []),
        ({"student_init": "random"}, "random weights", "apache-2.0", []),
        ({"student_init": "pretrained"}, "its pretrained weights", "mit", [STUDENT]),
        ({"student_init": "pretrained", "student_checkpoint": "s.pth"}, "the weights of a checkpoint", "unknown", []),
    ],
)
@pytest.mark.parametrize("teacher", [{"teacher_epochs": 0}, CHECKED, TRAINED | RANDOM, FINE_TUNED])
def test_a_students_start_is_its_own(config, words, license, bases, teacher):
    config = {"teacher": "resnet18", "student": "resnet10t"} | teacher | config
    assert start_of(config, "student") == words
    assert license_of_start({"license": "mit"}, config) == license
    assert base_models(config, uses_teacher=False) == bases


def test_of_a_model_without_a_run_its_own_license_holds():
    for part in ("teacher", "student"):
        assert license_of_start({"license": "mit"}, {}, part) == "mit"
        assert license_of_start({}, {}, part) == "unknown"
