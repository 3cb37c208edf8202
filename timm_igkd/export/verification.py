"""Exported files held against PyTorch: answers, accuracy, and their latency in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_igkd.data.items import read_item
from timm_igkd.errors import InputError
from timm_igkd.evaluation.comparison import image_interval, largest_share
from timm_igkd.evaluation.evaluated_model import create_evaluated_model
from timm_igkd.evaluation.metrics import classification_metrics, predict, teacher_agreement
from timm_igkd.evaluation.onnx_latency import time_files
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export.budget import Budget
from timm_igkd.export.record import ExportedFile, Format, Images, file_sha256, images_of
from timm_igkd.models.arguments import model_data_config
from timm_igkd.random_streams import fixed_noise

TIMING_S = 4.0
NOISE_IMAGES = 64


@dataclass(frozen=True)
class Verification:
    """What was found; see `ExportRecord`."""

    images: Images
    pytorch_top1: float | None
    files: tuple[ExportedFile, ...]


def verify_files(
    model: nn.Module,
    paths: Mapping[Format, Path],
    dataset: Any,
    indices: Sequence[int] | None,
    max_drop: float,
    *,
    with_top1: bool,
    progress: bool,
) -> Verification:
    """Compare exported files with their model, and time single images in them in turn, on one thread.

    Args:
        model: in eval mode on the CPU.
        paths: the files.
        dataset: of (PIL RGB image, label), None for noise.
        indices: the model's output of each of its classes, None where they are these in order.
        max_drop: see `export_student`.
        with_top1: measure the accuracy on `dataset`.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        InputError: no image. RunError: logits that are not finite.
    """
    models = [model, *(load_onnx_model(path) for path in paths.values())]
    images = dataset if with_top1 or dataset is None else _WithoutLabels(dataset)
    (expected, *found), targets = _logits(models, ["model", *paths], images, indices if with_top1 else None, progress)
    top1 = [
        classification_metrics(logits, targets)["top1"] if with_top1 and targets is not None else None
        for logits in (expected, *found)
    ]
    timings = time_files(list(paths.values()), seconds=TIMING_S, threads=1)
    files = []
    for (format, path), logits, percent, timing in zip(paths.items(), found, top1[1:], timings, strict=True):
        drop = None if percent is None or top1[0] is None else top1[0] - percent
        low = high = None
        if drop is not None and targets is not None:
            low, high = image_interval(*((one.argmax(1) == targets).numpy() for one in (expected, logits)))
        agreement = teacher_agreement(logits, expected)["agreement"]
        most = drop
        if most is None:  # were each other answer a wrong one; the float file's outputs are PyTorch's to 1e-4
            differing = round(len(expected) * (1 - agreement / 100))
            most = 100 - agreement if format == "onnx" else largest_share(differing, len(expected))
        is_within = most <= max_drop + 1e-9  # percents are no binary fractions
        files.append(
            ExportedFile(
                format=format,
                file=path.name,
                sha256=file_sha256(path),
                size_mb=path.stat().st_size / 1e6,
                top1=percent,
                drop=drop,
                agreement=agreement,
                max_difference=(logits - expected).abs().max().item(),
                latency_ms=timing,
                runtime=f"onnxruntime {import_module('onnxruntime').__version__}, CPU, one thread",  # that measured
                passed=True if is_within else None if drop is None else False,
                drop_low=low,
                drop_high=high,
            )
        )
    return Verification(images_of(dataset, len(expected)), top1[0], tuple(files))


class _WithoutLabels(Dataset[tuple[Any, int]]):
    """Images that answers alone are compared on: whatever their labels are, they are not looked at."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_item(self.dataset, index)[0], 0


def _logits(
    models: Sequence[nn.Module],
    roles: Sequence[str],
    dataset: Any,
    indices: Sequence[int] | None,
    progress: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Return each model's logits, and the outputs that the labels name; of noise there are none."""
    if dataset is None:
        size = model_data_config(models[0])["input_size"]
        noise = fixed_noise(NOISE_IMAGES, *size, draw=torch.randn)
        with torch.inference_mode():
            return [model(noise) for model in models], None
    if len(dataset) == 0:
        raise InputError("the split to verify an export on has no image; name another")
    evaluated = [
        create_evaluated_model(role, model, indices, dataset) for role, model in zip(roles, models, strict=True)
    ]
    logits, labels = predict(evaluated, dataset, progress=progress)
    return logits, evaluated[0].targets(labels)


def fastest(files: Sequence[ExportedFile], budget: Budget | None = None) -> Format | None:
    """Return the format of the fastest file that passed and is within a budget, None where none is."""
    passed = [file for file in files if file.passed and file.is_within(budget)]
    return min(passed, key=lambda file: file.latency_ms.median).format if passed else None
