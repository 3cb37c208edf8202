"""Evaluate a classifier, alone or beside its teacher: accuracy, calibration, agreement, size and warm latency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_igkd.data.items import dataset_name, first_part, read_item
from timm_igkd.errors import MOST_WORKERS, InputError, RunError, check_count, check_images, check_range, check_whole
from timm_igkd.eval_mode import eval_mode, usable_device
from timm_igkd.evaluation.calibration import reliability_bins
from timm_igkd.evaluation.evaluated_model import (
    EvaluatedModel,
    create_evaluated_model,
    have_same_outputs,
    shared_transforms,
    teacher_order,
)
from timm_igkd.evaluation.latency import describe_hardware, time_models
from timm_igkd.evaluation.onnx_model import OnnxModel
from timm_igkd.evaluation.robustness import measure_robustness
from timm_igkd.files import json_bytes, write_atomic
from timm_igkd.models.loading import count_macs, count_parameters
from timm_igkd.progress import progress_bar


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        metrics: the content of metrics.json.
        logits: (N, C) float32 on the CPU, in the order of the dataset, over all classes of the model.
        labels: (N,) int64, the dataset's own labels.
        teacher_logits: (N, C of the teacher) float32, or None without a teacher.
    """

    metrics: dict[str, Any]
    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None


class _Views(Dataset[tuple[list[Tensor], int]]):
    """Every image once, under each of several transforms."""

    def __init__(self, dataset: Any, transforms: Sequence[Any]) -> None:
        self.dataset = dataset
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image, label = read_item(self.dataset, index)
        return [transform(image) for transform in self.transforms], label


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    teacher: nn.Module | None = None,
    class_indices: Sequence[int] | None = None,
    teacher_class_indices: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    latency_device: str | torch.device | None = None,
    measure_latency: bool = True,
    corruptions: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate `model` on all of `dataset`, each model under its own timm evaluation transform.

    Args:
        model: any timm classifier, its mode and device are the same afterwards; or a file (`load_onnx_model`).
        dataset: map-style dataset of (PIL RGB image, label).
        teacher: second model, for `agreement`, `teacher_kl`, `compression` and `teacher`.
        class_indices: the model's index of each dataset class, where they are not the model's classes in order.
            Of a model alone, and of two whose outputs are the same or have the same names in another order, top-1,
            top-5, loss, ECE and robustness are then over all its classes, and `top1_subset` over the dataset's. Of two
            with other outputs, such as a student of ten classes and its teacher of a thousand, all are over the
            dataset's classes, or the student would win by what it does not know; `top1_all_classes` is over all that
            the larger one has.
        teacher_class_indices: the same for the teacher.
        batch_size: images per forward pass of the evaluation (latency is always measured at 1 and 64).
        num_workers: worker processes that decode and transform.
        device: where the models run.
        latency_device: where they are timed; default: `device`.
        measure_latency: time both models, for about a second per batch size.
        corruptions: images per kind and severity of corruption for `robustness` (see `measure_robustness`), evenly
            spread over the dataset and at most all of it; 0 leaves it out.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        Metrics, logits and labels.

    Raises:
        InputError: empty dataset, labels outside the model's classes, negative `corruptions`, or a device that this
            machine does not have.
        RunError: non-finite logits.
    """
    check_images("dataset", dataset)
    if len(dataset) == 0:
        raise InputError("the dataset to evaluate on has no image; name another split")
    check_range("batch_size", batch_size := check_whole("batch_size", batch_size), 1)
    num_workers = check_count("num_workers", num_workers, 0, MOST_WORKERS)
    check_range("corruptions", corruptions := check_whole("corruptions", corruptions), 0)
    device = usable_device("device", device)
    timed_on = device if latency_device is None else usable_device("latency_device", latency_device)
    batch_size = min(batch_size, len(dataset))
    models, order = [create_evaluated_model("model", model, class_indices, dataset)], None
    if teacher is not None:
        models.append(create_evaluated_model("teacher", teacher, teacher_class_indices, dataset))
        order = teacher_order(models[0], models[1], dataset)
        if order is None and not have_same_outputs(models):
            models = [replace(evaluated, only_dataset_classes=True) for evaluated in models]
    with eval_mode(*(evaluated.model for evaluated in models), device=device):
        all_logits, labels = predict(models, dataset, batch_size, num_workers, device, progress)
        results = [_measure(evaluated, logits, labels) for evaluated, logits in zip(models, all_logits, strict=True)]
        if measure_latency:
            results = [result | times for result, times in zip(results, _latencies(models, timed_on), strict=True)]
        if corruptions:
            limit = min(corruptions, len(dataset))
            found = measure_robustness(models, dataset, limit, batch_size, num_workers, device, progress)
            results = [result | {"robustness": r} for result, r in zip(results, found, strict=True)]
    where = {"n": len(labels), "dataset": dataset_name(dataset), "split": getattr(dataset, "split", None)}
    if revision := getattr(first_part(dataset), "revision", None):
        where["dataset_revision"] = revision
    metrics = results[0] | where
    if teacher is None:
        return Evaluation(metrics, all_logits[0], labels)
    metrics |= _compare(models, all_logits, order)
    own, teachers = (result["num_parameters"] for result in results)
    metrics["compression"] = None if None in (own, teachers) else teachers / max(own, 1)
    metrics["teacher"] = results[1] | where
    return Evaluation(metrics, all_logits[0], labels, all_logits[1])


@torch.inference_mode()
def predict(
    models: Sequence[EvaluatedModel],
    dataset: Any,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """Return the logits of models in eval mode, (N, C) float32 each, and the labels, reading each image once.

    Raises:
        InputError: a label outside a model's classes. RunError: non-finite logits.
    """
    transforms, positions = shared_transforms(models)
    loader = DataLoader(_Views(dataset, transforms), batch_size, num_workers=num_workers, generator=torch.Generator())
    collected: list[list[Tensor]] = [[] for _ in models]
    collected_labels: list[Tensor] = []
    start = 0
    for images, labels in progress_bar(loader, desc="evaluate", unit="batch", show=progress):
        for evaluated, position, logits in zip(models, positions, collected, strict=True):
            logits.append(evaluated.logits(images[position].to(device)).float().cpu())
            evaluated.check_batch(logits[-1], labels, start)
        collected_labels.append(labels)
        start += len(labels)
    return [torch.cat(logits) for logits in collected], torch.cat(collected_labels)


def classification_metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return accuracy, loss and calibration of a classifier's answers.

    Args:
        logits: (N, C) floating, N > 0.
        targets: (N,) int64 in 0 to C - 1, on the device of `logits`.

    Returns:
        top1 and top5 (percent; of equal logits the lower class comes first), loss (cross-entropy in nats) and ece
        (in [0, 1]).
    """
    log_probabilities = logits.double().log_softmax(dim=1)
    rank = _rank(logits, targets)
    return {
        "top1": 100 * (rank < 1).double().mean().item(),
        "top5": 100 * (rank < min(5, logits.shape[1])).double().mean().item(),
        "loss": -log_probabilities.gather(1, targets[:, None]).mean().item(),
        "ece": reliability_bins(log_probabilities.exp().cpu(), targets.cpu()).expected_calibration_error,
    }


def _measure(evaluated: EvaluatedModel, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the metrics of one model by itself, but for its latency."""
    metrics: dict[str, Any] = classification_metrics(evaluated.asked_logits(logits), evaluated.targets(labels))
    metrics |= _sizes(evaluated.model)
    if evaluated.class_indices is not None:
        metrics["top1_subset"] = _top1(evaluated.dataset_columns(logits), labels)
        if evaluated.only_dataset_classes:
            metrics["top1_all_classes"] = _top1(logits, evaluated.class_indices[labels])
    return metrics


def _top1(logits: Tensor, targets: Tensor) -> float:
    return 100 * (_rank(logits, targets) < 1).double().mean().item()


def _latencies(models: Sequence[EvaluatedModel], device: torch.device) -> list[dict[str, Any]]:
    """Return the latency of each model on a device, timed in turn."""
    networks = [evaluated.model for evaluated in models]
    with eval_mode(*networks, device=device):
        found = time_models(networks, [evaluated.data_config["input_size"] for evaluated in models], device)
    where = {"device": str(device), "threads": torch.get_num_threads(), "hardware": describe_hardware(device)}
    return [{"latency_ms": latency} | where for latency in found]


def _sizes(model: nn.Module) -> dict[str, float | None]:
    if isinstance(model, OnnxModel):
        return model.sizes
    weights = model.state_dict().values()
    size = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in weights)
    return {"num_parameters": count_parameters(model), "macs": count_macs(model), "size_mb": size / 1e6}


def _rank(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many classes come before the target; of equal logits the lower class comes first."""
    target = logits.gather(1, targets[:, None])
    tied_before = (logits == target) & (torch.arange(logits.shape[1], device=logits.device) < targets[:, None])
    return ((logits > target) | tied_before).sum(dim=1)


def _compare(models: Sequence[EvaluatedModel], all_logits: Sequence[Tensor], order: Tensor | None) -> dict[str, float]:
    """Return agreement and KL(teacher || student), over all classes if both have the same, else the dataset's.

    With an `order` they have the same: it names the teacher's output of each of the student's.
    """
    student, teacher = all_logits
    if order is not None:
        return teacher_agreement(student, teacher[:, order])
    if not have_same_outputs(models) or student.shape != teacher.shape:
        student, teacher = (
            evaluated.dataset_columns(logits) for evaluated, logits in zip(models, all_logits, strict=True)
        )
    if student.shape != teacher.shape:
        raise InputError(
            f"teacher and student must share their classes, found {teacher.shape[1]} and {student.shape[1]}; map the "
            "dataset's classes with class_indices and teacher_class_indices"
        )
    return teacher_agreement(student, teacher)


def teacher_agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Return how far a student answers as its teacher does.

    Args:
        student_logits: (N, C) over the same classes as `teacher_logits`, (N, C).

    Returns:
        `agreement`: percent of equal answers; `teacher_kl`: mean KL(teacher || student) in nats.
    """
    log_p, log_q = (logits.double().log_softmax(dim=1) for logits in (teacher_logits, student_logits))
    return {
        "agreement": 100 * (student_logits.argmax(1) == teacher_logits.argmax(1)).double().mean().item(),
        "teacher_kl": (log_p.exp() * (log_p - log_q)).sum(dim=1).mean().item(),
    }


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as strict JSON, through a temporary file so that a half-written one never looks complete."""
    try:
        content = json_bytes(dict(metrics))
    except ValueError as error:
        raise RunError(
            f"metrics must be finite numbers, found NaN or infinity ({error}); not writing {path}"
        ) from error
    write_atomic(Path(path), content)
