"""A table of tiny architectures, and students whose latency is said instead of measured."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm

from timm_igkd.errors import RunError
from timm_igkd.evaluation.latency import Timing
from timm_igkd.export.budget import Budget
from timm_igkd.export.candidates import Architecture
from timm_igkd.export.student_latency import StudentFile
from timm_igkd.export.students import StudentsRecord, find_students
from timm_igkd.models.loading import count_macs, count_parameters

SIDE = 32
TABLE = [
    Architecture("test_convnext", 160, 260_000, 512, 32_000_000, "r160_in1k"),
    Architecture("test_efficientnet", 160, 100_000, 256, 28_000_000, "r160_in1k"),
    Architecture("lcnet_035", 224, 350_000, 1281, 30_000_000, ""),
    Architecture("resnet50", 224, 23_508_032, 2049, 4_089_184_256, "a1_in1k"),
]
"""Three that are smaller than `TEACHER` at SIDE pixels, one that is not; the numbers are about right."""
TEACHER = "resnet10t"


def file(latency_ms: float, size_mb: float = 1.0, format: str = "onnx") -> StudentFile:
    return StudentFile(format, size_mb, Timing(latency_ms, latency_ms, 5))  # type: ignore[arg-type]


def say_latency(
    patch: pytest.MonkeyPatch, rate: float = 1e-6, slower: Mapping[str, float] | None = None, failing: str = ""
) -> list[str]:
    """Let a model take `rate` milliseconds a multiply-accumulate and 4 bytes a parameter; return who was asked for."""
    asked: list[str] = []

    def measure_files(model, *, int8, use_cache, folder):
        name = model.pretrained_cfg["architecture"]
        asked.append(name)
        if name == failing:
            raise RunError("onnxruntime cannot run it")
        latency, size = rate * count_macs(model) * (slower or {}).get(name, 1), 4e-6 * count_parameters(model)
        files = [file(latency, size)] + [file(latency / 2, size / 4, "onnx-int8")] * int8
        return tuple(files), False

    patch.setattr("timm_igkd.export.students.measure_files", measure_files)
    patch.setattr("timm_igkd.export.students.REPEATS", 0)
    patch.setattr("timm_igkd.export.candidates._MOST_CUTS", 2)
    patch.setattr("timm_igkd.export.candidates.read_architectures", lambda: TABLE)
    return asked


def tiny(name: str = TEACHER, classes: int = 10) -> object:
    overlay = {"input_size": (3, SIDE, SIDE)}
    return timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=overlay).eval()


def find(budget: Budget, **options: Any) -> StudentsRecord:
    """Return what is found for the tiny teacher."""
    return find_students(tiny(), budget, teacher_name=TEACHER, progress=False, **options)
