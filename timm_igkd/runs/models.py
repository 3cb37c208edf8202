"""The models of a run and the task that joins them, for recipes and studies alike."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.models.loading import load_model, use_image_size
from timm_igkd.models.truncation import truncate
from timm_igkd.random_streams import derive_seed, seeded


class TeacherSettings(Protocol):
    """Which teacher; settings that have these names."""

    @property
    def teacher(self) -> str | None:
        """A timm name, hf-hub:… or local-dir:…."""

    @property
    def teacher_args(self) -> dict[str, Any]:
        """Its arguments."""

    @property
    def teacher_checkpoint(self) -> str | None:
        """Its weights, where they are not its own."""

    @property
    def teacher_mean(self) -> tuple[float, float, float] | None:
        """Normalisation, where its own is not right."""

    @property
    def teacher_std(self) -> tuple[float, float, float] | None:
        """Normalisation, where its own is not right."""


class TaskSettings(Protocol):
    """Which losses; settings that have these names."""

    @property
    def loss_type(self) -> str:
        """Of distillation."""

    @property
    def distill_loss_weight(self) -> float:
        """Its weight."""

    @property
    def temperature(self) -> float:
        """Of distillation."""

    @property
    def attention_loss_weight(self) -> float:
        """Weight of attention transfer."""

    @property
    def overlay_prob(self) -> float:
        """Share of overlaid images."""

    @property
    def teacher_view(self) -> str:
        """What a live teacher sees of an overlaid image."""

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the teacher runs in the training loop."""


def create_teacher(settings: TeacherSettings, *, pretrained: bool, num_classes: int | None = None) -> nn.Module:
    """Return the teacher, or with `pretrained=False` its architecture with random weights.

    Args:
        settings: name it; `teacher` is not None.
        pretrained: read its weights.
        num_classes: another number of outputs than its own.
    """
    assert settings.teacher is not None
    return load_model(
        settings.teacher,
        model_args=settings.teacher_args,
        checkpoint=settings.teacher_checkpoint if pretrained else None,
        mean=settings.teacher_mean,
        std=settings.teacher_std,
        num_classes=num_classes,
        role="teacher",
        pretrained=pretrained,
    )


def create_student(
    name: str | None,
    model_args: dict[str, Any],
    drop: int,
    create_whole: Callable[[], nn.Module],
    *,
    num_classes: int,
    image_size: tuple[int, int],
    seed: int,
) -> nn.Module:
    """Return a student of random weights that only (architecture, seed) decide.

    Args:
        name: a timm name, or None: the teacher truncated.
        model_args: of the named model.
        drop: entries cut from the teacher's end.
        create_whole: makes the model that is truncated, of random weights or those that the student starts from.
        num_classes: of the dataset.
        image_size: (H, W) of its images.
        seed: of the run.
    """
    with seeded(derive_seed(seed, "init student")):
        if name is None:
            return truncate(create_whole(), drop, num_classes=num_classes)
        student = load_model(name, pretrained=False, model_args=model_args, num_classes=num_classes)
    use_image_size(student, *image_size)
    return student


def create_task(
    settings: TaskSettings,
    student: nn.Module,
    teacher: nn.Module | None,
    criterion: nn.Module | None,
    *,
    task_loss_weight: float | None = None,
    teacher_class_indices: Sequence[int] | None = None,
    verbose: bool = True,
) -> IGDistillationTask:
    """Return the task of a run; the teacher is in the loop only where the settings ask for it.

    Args:
        settings: of the losses.
        student: to train.
        teacher: on its device, or None.
        criterion: of the labels; None: timm's for Mixup's soft targets, cross-entropy for others.
        task_loss_weight: of the criterion; None: 1 - distill_loss_weight.
        teacher_class_indices: the teacher's outputs for the dataset's classes.
        verbose: log the resolved settings.
    """
    is_live = settings.needs_live_teacher
    return IGDistillationTask(
        student,
        teacher if is_live else None,
        criterion,
        loss_type=settings.loss_type,
        distill_loss_weight=settings.distill_loss_weight,
        task_loss_weight=task_loss_weight,
        temperature=settings.temperature,
        attention_loss_weight=settings.attention_loss_weight,
        teacher_class_indices=teacher_class_indices if is_live else None,
        teacher_view=settings.teacher_view if is_live and settings.overlay_prob > 0 else "same",
        verbose=verbose,
    )
