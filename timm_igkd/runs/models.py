"""The models of a run and the task that joins them, for recipes and studies alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from timm_igkd.data.labels import UNLABELED
from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError, RunError
from timm_igkd.export.budget import AUTO
from timm_igkd.models.checkpoint import has_weights
from timm_igkd.models.loading import find_model, load_model, use_image_size, use_whole_images
from timm_igkd.models.output_names import check_reads_colour, class_indices, forget_names, renew_head
from timm_igkd.models.truncation import truncate
from timm_igkd.random_streams import derive_seed, seeded
from timm_igkd.runs.checks import check_checkpoint
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.settings import RunConfig, Trained


@dataclass(frozen=True)
class Pretrained:
    """Pretrained weights that a student starts from.

    Attributes:
        class_names: of the dataset, or None; a head for other classes is replaced.
        checkpoint: file of the weights; None: the name's own.
        use_ema: take its EMA weights.
        weights: False: the architecture alone, with random weights.
    """

    class_names: Sequence[str] | None
    checkpoint: str | None
    use_ema: bool
    weights: bool


def find_start(config: RunConfig, name: Trained, *, fetch: bool) -> tuple[RunConfig, str | None]:
    """Have the weights at hand that a model of a run starts from, before anything is done.

    Args:
        config: of the run.
        name: of the model.
        fetch: look for the weights, on the Hub too; False where its stage is complete and needs them no more.

    Returns:
        The settings, with a random start where timm has no weights of that name, and a line that says so, or None.

    Raises:
        InputError, MissingFileError: no such model or file. RunError: no network, answered within seconds.
    """
    spec, checkpoint = getattr(config, name), getattr(config, f"{name}_checkpoint")
    note = None
    is_given = name == "teacher" and config.teacher_epochs == 0
    if spec is None or spec == AUTO:
        return config, None
    if getattr(config, f"{name}_init") == "pretrained" and not (is_given or checkpoint or has_weights(spec)):
        note = f"{name}: timm has no pretrained weights of the name {spec!r}, so it starts from random ones"
        found: dict[str, Any] = {f"{name}_init": "random"}
        config = replace(config, **found)
    if not fetch:
        return config, note
    pretrained = getattr(config, f"{name}_init") == "pretrained"
    check_checkpoint(config, name)
    try:
        find_model(spec, name, weights=pretrained and checkpoint is None)
    except RunError as error:
        random = "" if is_given or ":" in spec else f"--{name}-init random, "
        remedy = f"{random}--{name} local-dir:FOLDER or --{name}-checkpoint FILE"
        raise RunError(f"{error}; or start without the Hub: {remedy}") from error
    return config, note


def create_teacher(
    settings: Any, *, pretrained: bool, num_classes: int | None = None, img_size: int | None = None
) -> nn.Module:
    """Return the teacher, or with `pretrained=False` its architecture with random weights.

    Args:
        settings: a RunConfig or a study's; their settings that begin with "teacher".
        pretrained: read its weights.
        num_classes: another number of outputs than its own.
        img_size: side of its input, its own if None.
    """
    teacher = load_model(
        settings.teacher,
        model_args=settings.teacher_args,
        checkpoint=settings.teacher_checkpoint if pretrained else None,
        use_ema=settings.teacher_use_ema and pretrained,
        mean=settings.teacher_mean,
        std=settings.teacher_std,
        num_classes=num_classes,
        img_size=img_size,
        role="teacher",
        pretrained=pretrained,
    )
    check_reads_colour(teacher, "teacher")
    return teacher


def create_student(
    name: str | None,
    model_args: dict[str, Any],
    drop: int,
    create_whole: Callable[[], nn.Module],
    *,
    num_classes: int,
    image_size: tuple[int, int] | None,
    seed: int,
    img_size: int | None = None,
    start: Pretrained | None = None,
) -> nn.Module:
    """Return a student; what is random in it, only (architecture, seed) decide.

    Args:
        name: a timm name, hf-hub:… or local-dir:…, or None: the teacher truncated.
        model_args: of the named model.
        drop: entries cut from the teacher's end.
        create_whole: makes the model that is truncated, of random weights or those that the student starts from.
        num_classes: of the dataset.
        image_size: (H, W) of its images; None: they have several.
        seed: of the run.
        img_size: side of the named model's input, its own if None.
        start: pretrained weights of the named model; None: random ones.
    """
    with seeded(derive_seed(seed, "init student")):
        if name is None:
            return truncate(create_whole(), drop, num_classes=num_classes)
        options: dict[str, Any] = {"model_args": model_args, "img_size": img_size, "role": "student"}
        if start is None:
            student = load_model(name, pretrained=False, num_classes=num_classes, **options)
        else:
            checkpoint = start.checkpoint if start.weights else None
            use_ema = start.use_ema and start.weights
            student = load_model(name, pretrained=start.weights, checkpoint=checkpoint, use_ema=use_ema, **options)
            renew_head(student, start.class_names, num_classes)
        forget_names(student)  # the data set's are saved with it
    check_reads_colour(student, "student")
    if start is None and img_size is None and image_size is not None:
        use_image_size(student, *image_size)
    return student


def create_task(
    settings: Any,
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
        settings: a RunConfig or a cell of a study; their losses and views.
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
        explanation_loss_weight=settings.explanation_loss_weight,
        explanation_map=settings.explanation_map,
        explanation_channels=settings.explanation_channels,
        teacher_class_indices=teacher_class_indices if is_live else None,
        teacher_view=settings.teacher_view if is_live and settings.overlay_prob > 0 else "same",
        verbose=verbose,
    )


def check_processes(task: IGDistillationTask, num_processes: int) -> None:
    """Raise InputError where processes would wait for gradients of a head that has none."""
    if num_processes > 1 and not (task.task_loss_weight or task.distill_loss_weight):
        raise InputError(  # an explanation loss reaches the head's weight, and not its bias
            "attention transfer and explanation loss alone leave the student's head, or its bias, without a "
            "gradient, which several processes wait for; set task_loss_weight or distill_loss_weight above 0, or "
            "launch one process"
        )


class RunModels:
    """Teacher and student of a run: where each starts from, and what is saved of them.

    Args:
        config: the run's settings.
        data: its images.
        folder: its files.
    """

    def __init__(self, config: RunConfig, data: RunData, folder: RunFolder):
        self.config, self.data, self.folder = config, data, folder

    def teacher(self, weights: bool = True) -> nn.Module:
        """Return the teacher before training, checked against the dataset's classes where it is not trained.

        Args:
            weights: read those that it starts from; False for its architecture alone.
        """
        config = self.config
        is_trained, pretrained = config.teacher_epochs > 0, config.teacher_init == "pretrained"
        with seeded(derive_seed(config.seed, "init teacher")):
            num_classes = None if pretrained else self.data.num_classes
            model = create_teacher(
                config, pretrained=pretrained and weights, num_classes=num_classes, img_size=config.img_size
            )
            if is_trained and pretrained:
                renew_head(model, self.data.train.class_names, self.data.num_classes)
        if is_trained:
            forget_names(model)  # also those of a head of the right size: it learns the data set's numbers now
        if not pretrained and config.img_size is None and self.data.image_size is not None:
            use_image_size(model, *self.data.image_size)
        if is_trained:
            self._use_crop(model)
        self.teacher_indices(model)
        return model

    def student(self, create_whole: Callable[[], nn.Module], weights: bool = True) -> nn.Module:
        """Return the student before training.

        Args:
            create_whole: makes the teacher that is truncated where no student is named.
            weights: read those that it starts from; False for its architecture alone.
        """
        config = self.config
        names, checkpoint = self.data.train.class_names, config.student_checkpoint
        start = Pretrained(names, checkpoint, config.student_use_ema, weights)
        model = create_student(
            config.student,
            config.student_args,
            config.student_drop,
            create_whole,
            num_classes=self.data.num_classes,
            image_size=self.data.image_size,
            seed=config.seed,
            img_size=config.img_size,
            start=start if config.student_init == "pretrained" else None,
        )
        self._use_crop(model)
        return model

    def _use_crop(self, model: nn.Module) -> None:
        """Evaluate a model that the run trains as it is trained; after RandomResizedCrop, by its own preprocessing."""
        if self.config.train_crop != "rrc":
            use_whole_images(model)

    def teacher_task(self, teacher: nn.Module) -> IGDistillationTask:
        """Return the task that trains the teacher on the labels."""
        return IGDistillationTask(teacher, task_loss_weight=1.0, distill_loss_weight=0, criterion=self.criterion())

    def task(self, student: nn.Module, teacher: nn.Module) -> IGDistillationTask:
        """Return the task that distils the student."""
        return create_task(
            self.config,
            student,
            teacher,
            self.criterion(with_unlabeled=True),
            task_loss_weight=self.config.task_loss_weight if self.data.train.has_labels else 0.0,
            teacher_class_indices=self.teacher_indices(teacher) if self.config.needs_live_teacher else None,
        )

    def criterion(self, with_unlabeled: bool = False) -> nn.Module | None:
        """Return the loss of the labels, which some images may lack; None: timm's for Mixup's soft targets."""
        lacks_labels = self.config.unlabeled is not None or not self.data.train.has_labels
        if with_unlabeled and lacks_labels:
            return LabeledCrossEntropy(UNLABELED, self.config.smoothing)
        return None if self.config.mixes else nn.CrossEntropyLoss(label_smoothing=self.config.smoothing)

    def teacher_indices(self, teacher: nn.Module) -> list[int] | None:
        """Return the teacher's outputs for the dataset's classes, None where they are the same.

        They are those of a teacher that the run trains, whatever its outputs were called, or as many are of ImageNet.
        """
        if self.config.teacher_epochs > 0:
            return None
        return class_indices(teacher, self.data.train.class_names, self.data.num_classes)

    def saved(self, name: str, pretrained: bool = True) -> nn.Module:
        """Return a model as its stage left it."""
        return load_model(f"local-dir:{self.folder.model(name)}", role=name, pretrained=pretrained)
