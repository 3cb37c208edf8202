"""A model under evaluation: with its own preprocessing, and its own index of each class of the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import create_transform
from torch import Tensor, nn

from timm_igkd.data.items import class_map, class_names, first_part
from timm_igkd.distillation.live_teacher import check_has_classifier, check_logits
from timm_igkd.errors import InputError, RunError, check_indices
from timm_igkd.eval_mode import in_precision_of, preprocessed_model
from timm_igkd.models.arguments import model_data_config
from timm_igkd.models.output_names import (
    check_class_map,
    check_reads_colour,
    class_indices,
    output_names,
    own_names,
)


@dataclass(frozen=True)
class EvaluatedModel:
    """One model under evaluation.

    Attributes:
        role: what errors call it.
        model: with its own preprocessing.
        class_indices: its index of each dataset class, None where they are its classes in order.
        data_config: of its preprocessing.
        only_dataset_classes: it is asked for one of the dataset's classes, not for one of all that it knows.
    """

    role: str
    model: nn.Module
    class_indices: Tensor | None
    data_config: dict[str, Any]
    only_dataset_classes: bool = False

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of images on its device, (B, C) in the model's precision, which the images take on."""
        return check_logits(self.role, self.model(in_precision_of(self.model, images)))

    def asked_logits(self, logits: Tensor) -> Tensor:
        """Return the logits of the classes that it is asked for."""
        return self.dataset_columns(logits) if self.only_dataset_classes else logits

    def targets(self, labels: Tensor) -> Tensor:
        """Return the place of each of the dataset's labels among these."""
        return labels if self.class_indices is None or self.only_dataset_classes else self.class_indices[labels]

    def dataset_columns(self, logits: Tensor) -> Tensor:
        """Return the columns of the dataset's classes, in the dataset's order."""
        return logits if self.class_indices is None else logits[:, self.class_indices]

    def check_batch(self, logits: Tensor, labels: Tensor, start: int) -> None:
        """Raise unless the logits of the images from number `start` on are finite and every label is a class."""
        num_classes = logits.shape[1] if self.class_indices is None else len(self.class_indices)
        outside = ((labels < 0) | (labels >= num_classes)).nonzero()
        if len(outside):
            i = int(outside[0])
            raise InputError(
                f"label of image {start + i} must be in 0..{num_classes - 1}, the classes of the {self.role}, got "
                f"{int(labels[i])}; use a model of this dataset, or map the dataset's classes with class_indices"
            )
        first = int(logits.isfinite().all(dim=1).int().argmin())  # of those that are not finite, where any are
        self.check_finite(logits, f"image {start + first}")

    def check_finite(self, logits: Tensor, which: str) -> None:
        """Raise RunError unless the logits of an image, as the message calls it, are finite."""
        if not logits.isfinite().all():
            raise RunError(
                f"the {self.role} gives non-finite logits for {which}; its weights are damaged, or it needs float32"
            )


def indices_for(model: nn.Module, dataset: Any) -> list[int] | None:
    """Return the model's output of each of a dataset's classes, see `class_indices`.

    Where neither names them, labels are outputs, of which a split may lack the last ones.
    """
    names = class_names(dataset)
    if names is None and not output_names(model)[0] and class_map(dataset) is None:
        return None
    num_classes = getattr(first_part(dataset), "num_classes", None) or len(names or ()) or cast(int, model.num_classes)
    return class_indices(model, names, num_classes)


def create_evaluated_model(role: str, model: nn.Module, indices: Sequence[int] | None, dataset: Any) -> EvaluatedModel:
    """Return a model with its preprocessing and classes.

    Args:
        role: what errors call it.
        model: a timm classifier; wrappers, such as DataParallel's, are taken off.
        indices: the model's index of each dataset class; None: by the names, where those of both are known, the model's
            as ImageNet's too, else in order.
        dataset: what it is evaluated on.

    Raises:
        InputTypeError: no torch module.
        InputError: no preprocessing, images other than colour ones, no classifier, or the dataset's classes are not the
            model's.
    """
    model = preprocessed_model(role, model)
    indices = None if indices is None else check_indices(f"class_indices of the {role}", indices)
    check_reads_colour(model, role)
    check_has_classifier(model, role)
    names, num_classes = class_names(dataset), getattr(model, "num_classes", None)
    if indices is not None and names is not None and len(indices) != len(names):
        raise InputError(
            f"class_indices of the {role} must have one entry per dataset class ({len(names)}), got {len(indices)}"
        )
    if indices is None and (labels := class_map(dataset)) is not None:
        check_class_map(model, labels)
    elif indices is None and names is not None and output_names(model)[0]:
        indices = class_indices(model, names, len(names))
    if indices is not None and num_classes and not all(0 <= i < num_classes for i in indices):
        raise InputError(
            f"class_indices of the {role} must be in 0..{num_classes - 1}, got {min(indices)}..{max(indices)}"
        )
    if indices is None and names is not None and num_classes and len(names) != num_classes:
        raise InputError(
            f"the {role} has {num_classes} classes and the dataset {len(names)}; use a model of this dataset, or "
            "map the dataset's classes with class_indices"
        )
    wanted = None if indices is None else torch.tensor(list(indices), dtype=torch.int64)
    return EvaluatedModel(role, model, wanted, model_data_config(model))


def have_same_outputs(models: Sequence[EvaluatedModel]) -> bool:
    """Return whether the dataset's classes are the same outputs of all models."""
    first, *others = [evaluated.class_indices for evaluated in models]
    return all(torch.equal(first, i) if first is not None and i is not None else first is i for i in others)


def teacher_order(student: EvaluatedModel, teacher: EvaluatedModel, dataset: Any) -> Tensor | None:
    """Return the teacher's output of each of the student's outputs, (C,) int64; None where names do not tell it.

    They do where both name the same outputs, and the dataset's classes are given to both by these names.

    Raises:
        InputError: both name the same outputs in different orders, and the dataset none: its labels are of either.
    """
    own, others = (own_names(evaluated.model) for evaluated in (student, teacher))
    if own is None or others is None or sorted(own) != sorted(others):
        return None
    by_number = student.class_indices is None and teacher.class_indices is None and class_map(dataset) is None
    if by_number and own != others:
        first = next(i for i, name in enumerate(own) if others[i] != name)
        raise InputError(
            f"output {first} is {own[first]!r} of the model and {others[first]!r} of the teacher, and the dataset "
            "names no class: its labels would be other classes to each; give class_indices and teacher_class_indices, "
            "or a dataset with class names"
        )
    if own != others and len(set(own)) < len(own):
        return None  # two of one name: which is which is not told
    order = torch.arange(len(own)) if own == others else torch.tensor([others.index(name) for name in own])
    if student.class_indices is None and teacher.class_indices is None:
        return order
    mine, theirs = (
        torch.arange(len(own)) if evaluated.class_indices is None else evaluated.class_indices
        for evaluated in (student, teacher)
    )
    return order if torch.equal(order[mine], theirs) else None


def shared_transforms(models: Sequence[EvaluatedModel]) -> tuple[list[Any], list[int]]:
    """Return timm's evaluation transforms without repeats, and which of them each model takes."""
    configs: list[dict[str, Any]] = []
    for evaluated in models:
        if evaluated.data_config not in configs:
            configs.append(evaluated.data_config)
    transforms = [create_transform(**config, is_training=False) for config in configs]
    return transforms, [configs.index(evaluated.data_config) for evaluated in models]
