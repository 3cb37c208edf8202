"""The training task: cross-entropy + distillation from a live teacher or stored logits + attention + explanations.

    task = IGDistillationTask(student, teacher)
    result = task(input, target)
    result["loss"].backward()

Arms are option values: a term whose weight is 0 is not computed, and a teacher that no term needs is not called.
"""

import logging
from collections.abc import Sequence
from typing import Any, get_args

import torch
from timm.task import TrainingTask
from timm.task.classification import resolve_classification_loss
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_igkd.distillation.batch_checks import (
    check_criterion,
    check_labels,
    check_maps,
    check_stored_logits,
    resolve_class_index,
    select_classes,
)
from timm_igkd.distillation.explanation import explanation_loss
from timm_igkd.distillation.live_teacher import LiveTeacher, check_logits, check_pair, resolve_attention_index
from timm_igkd.distillation.losses import KD_LOSSES, attention_transfer, check_loss_type
from timm_igkd.distillation.options import TeacherViewMode, check_temperature
from timm_igkd.distillation.trained_student import TrainedStudent
from timm_igkd.distillation.views import VIEW_LAYOUTS, ViewReader, Views
from timm_igkd.distillation.weights import check_built, check_weight, resolve_weights
from timm_igkd.errors import InputError, InputTypeError, check_choice
from timm_igkd.eval_mode import bare_model, usable_device

_logger = logging.getLogger(__name__)


class IGDistillationTask(TrainingTask):
    """Train a student on labels, a teacher's logits, attention and maps, each with its weight.

    loss = task_loss_weight * CE + distill_loss_weight * KD + attention_loss_weight * AT + explanation_loss_weight * E,
    with the paper's weights by default.

    Args:
        student: the model to train. Its `pretrained_cfg` must name the mean and std its input is normalised with.
        teacher: a live teacher; it is frozen in place, stays in eval mode, has its own normalisation and input size.
        criterion: the task loss; cross-entropy by default, for class indices and for soft targets. Where some images
            have no label: `LabeledCrossEntropy` (labeled_loss.py).
        loss_type: a key of `timm_igkd.distillation.losses.KD_LOSSES`.
        student_model: timm's name for `student`.
        teacher_model: timm's name for `teacher`.
        distill_loss_weight: weight of KD (the paper's alpha); see `resolve_weights` for what one weight alone means.
        task_loss_weight: weight of CE.
        temperature: softmax temperature of KD.
        attention_loss_weight: weight of AT (the paper's gamma, 0.8 there); needs a live teacher.
        student_attention_index: which entry of `forward_intermediates` AT compares, by default the middle one.
        teacher_attention_index: the same for the teacher.
        explanation_loss_weight: weight of E (explanation.py; 1 in its authors' code); needs `maps` with every batch.
        explanation_map: how the student explains the label's logit: "input_x_gradient"; "grad_cam", of its last map.
        explanation_channels: how those of input times gradient are joined, as the maps' were: "abs_sum", "positive".
        teacher_class_indices: the teacher's outputs for the student's classes, in their order.
        teacher_input_size: (H, W) the teacher is fed, by default its own.
        teacher_view: what a live teacher sees in training. "same" is the student's input. "clean" is a second view,
            which comes with every batch (see `forward`).
        view_layout: "pair": two views are two tensors. "flat": `input` holds the student's views, then the teacher's,
            and the targets are repeated, as timm's fast_collate (prefetcher) does with two views of an item.
        dkd_alpha: weight of TCKD in loss_type "dkd".
        dkd_beta: weight of NCKD in loss_type "dkd".
        device: of the task's tensors and the teacher, by default the student's.
        dtype: kept for timm's signature; converts nothing.
        verbose: log the resolved settings.

    Raises:
        InputError: an option out of range, or models that do not fit together.
    """

    def __init__(
        self,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        criterion: nn.Module | None = None,
        *,
        student_model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        loss_type: str = "kl",
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        temperature: float = 2.5,
        attention_loss_weight: float = 0.0,
        student_attention_index: int | None = None,
        teacher_attention_index: int | None = None,
        explanation_loss_weight: float = 0.0,
        explanation_map: str = "input_x_gradient",
        explanation_channels: str = "abs_sum",
        teacher_class_indices: Sequence[int] | None = None,
        teacher_input_size: tuple[int, int] | None = None,
        teacher_view: str = "same",
        view_layout: str = "pair",
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        student = student_model if student is None else student
        teacher = teacher_model if teacher is None else teacher
        if student is None:
            raise InputTypeError("IGDistillationTask needs a student, got none; give the model to train")
        check_pair(student, teacher)
        device = next(student.parameters()).device if device is None else usable_device("device", device)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.loss_type = check_choice("loss_type", loss_type, KD_LOSSES)
        self.teacher_view = check_choice("teacher_view", teacher_view, get_args(TeacherViewMode))
        self.view_layout = check_choice("view_layout", view_layout, VIEW_LAYOUTS)
        weights = resolve_weights(task_loss_weight, distill_loss_weight, attention_loss_weight, explanation_loss_weight)
        self.task_loss_weight, self.distill_loss_weight = weights.task, weights.distill
        self.attention_loss_weight, self.explanation_loss_weight = weights.attention, weights.explanation
        self.temperature = check_temperature(temperature)
        dkd_options = {"alpha": check_weight("dkd_alpha", dkd_alpha), "beta": check_weight("dkd_beta", dkd_beta)}
        self._kd_options = dkd_options if loss_type == "dkd" else {}
        self.criterion = resolve_classification_loss(check_criterion(criterion), self.device)
        distills = self.distill_loss_weight > 0
        if distills:
            check_loss_type(loss_type, getattr(bare_model(student), "num_classes", None))
            check_labels(loss_type, criterion)
        may_distill = distills or teacher_class_indices is not None  # the weight may be raised from 0 later
        class_index = resolve_class_index(teacher_class_indices, student, teacher) if may_distill else None
        self._class_index: Tensor | None
        self.register_buffer("_class_index", class_index, persistent=False)
        self._last_class = -1 if class_index is None else int(class_index.max())

        self._transfers_attention, self._explains = self.attention_loss_weight > 0, self.explanation_loss_weight > 0
        if self._transfers_attention:
            if teacher is None:
                raise InputError(
                    "attention transfer needs a live teacher's features, got teacher=None (stored logits hold no "
                    "features); pass the teacher, or set attention_loss_weight=0"
                )
            teacher_attention_index = resolve_attention_index("teacher", teacher, teacher_attention_index)
            student_attention_index = resolve_attention_index("student", student, student_attention_index)
        self.trainable_module: nn.Module = student
        if self._transfers_attention or self._explains:
            index = student_attention_index if self._transfers_attention else None
            kind: Any = explanation_map if self._explains else None
            self.trainable_module = TrainedStudent(student, index, kind, explanation_channels)
        self.teacher: LiveTeacher | None = None
        if teacher is not None:
            self.teacher = LiveTeacher(teacher, student, teacher_attention_index, teacher_input_size)
        unseen = "there is no live teacher" if teacher is None else "teacher_view is 'same'"
        self._views = ViewReader(self.view_layout, "" if self.two_view_batches else unseen)
        self.to(self.device)
        if verbose:
            _logger.info(self.describe())

    def describe(self) -> str:
        """Return the resolved settings in one line."""
        attention, explanation = "", ""
        student: Any = bare_model(self.trainable_module)
        if self._transfers_attention and self.teacher is not None:
            attention = f" (entries {student.attention_index}, {self.teacher.attention_index})"
        if self._explains:
            explanation = f"explanation_loss_weight={self.explanation_loss_weight:g} ({student.explanation}), "
        teacher = "none" if self.teacher is None else f"view {self.teacher_view}, input {self.teacher.describe()}"
        return (
            f"{type(self).__name__}: task_loss_weight={self.task_loss_weight:g}, "
            f"distill_loss_weight={self.distill_loss_weight:g} ({self.loss_type}, temperature {self.temperature:g}), "
            f"{explanation}attention_loss_weight={self.attention_loss_weight:g}{attention}; teacher: {teacher}"
        )

    @property
    def two_view_batches(self) -> bool:
        """Whether training batches must hold the student's views and the teacher's.

        This depends on the presence of a teacher and on `teacher_view`, not on the weights.
        """
        return self.teacher is not None and self.teacher_view == "clean"

    def forward(
        self,
        input: Views,
        target: Tensor,
        teacher_input: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        maps: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the student, and the teacher where a term needs it.

        Args:
            input: (B, C, H, W) normalised for the student. Where `two_view_batches`, in training mode: a pair
                (student's, teacher's) of such tensors, or with view_layout "flat" one of (2B, C, H, W), unless
                teacher_input is given. In eval mode both models see the whole input.
            target: class indices, or class probabilities of Mixup or CutMix; as many as `input`.
            teacher_input: (B, C, h, w) the teacher's view, normalised for the student.
            teacher_logits: (B, classes) stored logits, in place of a live teacher.
            maps: (B, 1, h, w) the teacher's maps, non-negative, in the coordinates of the student's views and 0 where
                these show none of the image. In eval mode without them, E is left out.

        Returns:
            'loss', 'output' (the student's B logits; their targets are the first B) and, as far as computed,
            'task_loss', 'distill_loss' (also as 'kd_loss', its name in timm), 'attention_loss' and 'explanation_loss',
            not yet weighted.

        Raises:
            InputError: a batch that does not hold what the options call for, or a weight of attention or explanations
                that was raised from 0 after the task was built.
        """
        check_built("attention_loss_weight", self.attention_loss_weight, self._transfers_attention)
        check_built("explanation_loss_weight", self.explanation_loss_weight, self._explains)
        input, target, teacher_input = self._views.read(input, target, teacher_input, self.training)
        distills, transfers = self.distill_loss_weight > 0, self.attention_loss_weight > 0
        check_stored_logits(
            teacher_logits,
            target,
            distill_loss_weight=self.distill_loss_weight,
            is_live=self.teacher is not None,
            transfers=self._transfers_attention,
        )
        explains = self._explains and (self.training or maps is not None)
        if explains:
            check_maps(maps, input, target)

        outputs: Any = self.trainable_module(input, target) if explains else self.trainable_module(input)
        is_alone = not (self._transfers_attention or self._explains)
        parts: Any = (outputs, None, None) if is_alone else outputs
        output, features, student_maps = parts
        output = check_logits("student", output)
        teacher_features: Any = None
        if self.teacher is not None and (distills or transfers):
            teacher_logits, teacher_features = self.teacher(teacher_input, logits=distills, features=transfers)

        losses = {}
        if self.task_loss_weight > 0:
            losses["task_loss"] = self.criterion(output, target)
        if distills:
            assert teacher_logits is not None
            check_labels(self.loss_type, self.criterion)
            teacher_logits = select_classes(teacher_logits.to(output.device), self._class_index, self._last_class)
            kd_loss = KD_LOSSES[self.loss_type]
            losses["distill_loss"] = kd_loss(output, teacher_logits, self.temperature, target, **self._kd_options)
        if transfers:
            losses["attention_loss"] = attention_transfer(features, teacher_features)
        if explains:
            assert maps is not None
            losses["explanation_loss"] = explanation_loss(student_maps, maps, target)
        loss = sum((getattr(self, f"{name}_weight") * value for name, value in losses.items()), output.new_zeros(()))
        if distills:
            losses["kd_loss"] = losses["distill_loss"]
        return {"loss": loss, "output": output, **losses}

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "IGDistillationTask":
        """Wrap the trainable module in DistributedDataParallel; the teacher stays as it is."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(  # type: ignore[override]  # timm's signature
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the training forward, the teacher, and the student that evaluation uses, which is returned.

        Raises:
            InputError: an explanation loss, whose second derivatives torch.compile cannot do.
        """
        if self._explains:
            raise InputError(
                "torch.compile has no second derivatives, which the explanation loss needs; train without it, or set "
                "explanation_loss_weight=0"
            )
        options: Any = {"backend": backend, "mode": mode, **compile_kwargs}
        student: Any = self.get_eval_model()
        trainable: Any = torch.compile(self.trainable_module, **options)
        self.trainable_module = trainable
        self.eval_model: Any = torch.compile(student, **options) if self._transfers_attention else trainable
        if self.teacher is not None:
            self.teacher.compile(**options)
        compiled: Any = self.eval_model
        return compiled

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Create an EMA copy of the trainable module, also once it is wrapped for distributed training or compiled."""
        module = bare_model(self.trainable_module)
        self.trainable_module_ema = ModelEmaV3(module, decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student (its EMA) free of wrappers, or its compiled form after `compile` (`compile_ema`)."""
        if module is None and hasattr(self, "eval_model_ema" if ema else "eval_model"):
            return super().get_eval_model(ema=ema)
        module = bare_model(super().get_eval_model(module=module, ema=ema))
        return module.student if isinstance(module, TrainedStudent) else module
