"""The student as it is trained: one forward pass for its logits, its features and its map, as DDP must see it."""

from typing import Any, get_args

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_igkd.distillation.explanation import (
    captured,
    differentiable_gradient,
    grad_cam,
    input_x_gradient,
    target_sum,
    twice_differentiable,
)
from timm_igkd.distillation.live_teacher import check_logits, forward_with_features, probe_image
from timm_igkd.distillation.options import ExplanationMap, JoinedChannels
from timm_igkd.errors import InputError, check_choice, first_line
from timm_igkd.eval_mode import bare_model, copy_model, eval_mode
from timm_igkd.feature_maps import last_norm

_REMEDY = "set explanation_loss_weight=0"


class TrainedStudent(FeatureDistillationTrainableModule):
    """A student that also returns features or its map; timm's base keeps its parameter groups.

    The map is of the very pass that gives the logits: batch norms and dropout work as they do in it, statistics move
    once. Where a batch norm takes the batch's statistics, a gradient holds what an image does to others' outputs too.

    Args:
        student: to train.
        attention_index: the entry of `forward_intermediates` that is returned, or None.
        explanation: an ExplanationMap, or None.
        channels: JoinedChannels, of input times gradient.

    Raises:
        InputError: a student that has no such map, or one that cannot be learnt from.
    """

    def __init__(
        self,
        student: nn.Module,
        attention_index: int | None = None,
        explanation: str | None = None,
        channels: str = "abs_sum",
    ):
        if isinstance(student, nn.DataParallel | AveragedModel | ModelEmaV2 | ModelEmaV3):
            raise _wrapped(student)
        super().__init__(student)
        if explanation is not None:
            check_choice("explanation_map", explanation, get_args(ExplanationMap))
        check_choice("explanation_channels", channels, get_args(JoinedChannels))
        self.attention_index, self.explanation, self.channels = attention_index, explanation, channels
        self._norm: str | None = None  # by its name, for a copy has another of that name
        if attention_index is not None or explanation == "grad_cam":
            _refuse_patch_dropout(student)
        if explanation is not None:
            _refuse_checkpointing(student)
            self._norm = _find_norm(student) if explanation == "grad_cam" else None
        needed = {
            "forward_intermediates": attention_index is not None,
            "forward_features": explanation == "grad_cam" and self._norm is None,
        }
        if any(is_needed and not hasattr(student, method) for method, is_needed in needed.items()):  # DDP has none
            raise _wrapped(student)
        if explanation is not None:
            self._check_differentiable()

    def forward(  # type: ignore[override]  # timm's returns two
        self, input: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return logits, the chosen entry and, where there is a target, the map of its logit.

        Args:
            input: (B, C, H, W).
            target: (B,) class indices; those below 0 get the map of class 0.

        Returns:
            (B, classes), (B, C', h, w) or None, (B, 1, H or h', W or w') or None.

        Raises:
            InputError: a map in inference mode, where torch has no gradient, or with gradient checkpointing.
        """
        if target is None:
            return *self._logits_and_entry(input), None
        _refuse_checkpointing(self.student)
        if torch.is_inference_mode_enabled():
            raise InputError(
                "a student's map takes a gradient, which torch.inference_mode() has none of; use torch.no_grad(), "
                "or leave the maps out"
            )
        with_graph = torch.is_grad_enabled()
        with torch.enable_grad(), twice_differentiable():
            logits, entry, maps = self._explained(input, target)
        if with_graph:
            return logits, entry, maps
        return logits.detach(), None if entry is None else entry.detach(), maps.detach()

    def _logits_and_entry(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.attention_index is None:
            return check_logits("student", self.student(input)), None
        return forward_with_features(self.student, input, self.attention_index)

    def _explained(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.explanation == "input_x_gradient":
            image = input.detach().requires_grad_()
            logits, entry = self._logits_and_entry(image)
            gradient = differentiable_gradient(target_sum(logits, target), image)
            return logits, entry, input_x_gradient(image, gradient, self.channels)
        if self._norm is not None:
            with captured(self.student.get_submodule(self._norm)) as taken:
                logits, entry = self._logits_and_entry(input)
            features = taken[-1]
        else:
            logits, entry, features = self._through_head(input)
        gradient = differentiable_gradient(target_sum(logits, target), features)
        return logits, entry, grad_cam(bare_model(self.student), features, gradient, input.shape[-2:])

    def _through_head(self, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return logits, the chosen entry, and the last features, which the logits are computed from."""
        student: Any = self.student
        if self.attention_index is None:
            features, entry = student.forward_features(input), None
        else:
            features, (entry,) = student.forward_intermediates(input, indices=[self.attention_index], output_fmt="NCHW")
        return student.forward_head(features.clone()), entry, features

    def _check_differentiable(self) -> None:
        """Raise InputError unless a loss of the map has a gradient: one image goes through a copy and back."""
        copied = copy_model(self).eval()
        image = probe_image(bare_model(copied.student))
        name = type(bare_model(copied.student)).__name__
        try:
            with torch.enable_grad():
                maps = copied(image, torch.zeros(1, dtype=torch.int64, device=image.device))[2]
                maps.square().sum().backward()  # to all weights: where second derivatives are missing, this raises
        except RuntimeError as error:
            raise InputError(
                f"the explanation loss needs second derivatives, which student {name} lacks ({first_line(error)}); "
                f"choose another student, or {_REMEDY}"
            ) from error
        if all(weight.grad is None for weight in copied.parameters()):
            raise InputError(
                f"the explanation loss has no gradient in student {name}, whose map does not depend on its weights; "
                f"choose another student, or {_REMEDY}"
            )


def _wrapped(student: nn.Module) -> InputError:
    return InputError(
        f"a student that returns features or maps cannot be trained inside {type(student).__name__}; give the "
        "model itself, and wrap the task, or launch processes with accelerate"
    )


def _refuse_checkpointing(student: nn.Module) -> None:
    """Raise InputError where activations are computed again in the backward pass: outside of `twice_differentiable`."""
    if any(vars(module).get("grad_checkpointing") for module in student.modules()):
        raise InputError(
            "the explanation loss takes second derivatives, which gradient checkpointing spoils; call "
            f"student.set_grad_checkpointing(False), or {_REMEDY}"
        )


def _refuse_patch_dropout(student: nn.Module) -> None:
    """Raise InputError where a student drops patches in training: those that are left, in any order, are no map."""
    name = type(bare_model(student)).__name__
    for module in student.modules():
        is_layer = isinstance(module, PatchDropout | PatchDropoutWithIndices)
        if vars(module).get("prob" if is_layer else "patch_drop_rate"):  # the latter is Hiera's own
            raise InputError(
                f"attention transfer and grad_cam need whole feature maps, student {name} drops "
                "patches in training; build it with patch_drop_rate=0, or explain it by input_x_gradient"
            )


def _find_norm(student: nn.Module) -> str | None:
    """Return the name of the module whose output Grad-CAM weights, None for the last features (feature_maps.py)."""
    bare: Any = bare_model(student)
    image = probe_image(bare)
    with eval_mode(student):
        norm = last_norm(bare, image, image.shape[-2:])
    return next((name for name, module in student.named_modules() if module is norm), None)
