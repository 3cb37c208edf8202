"""A teacher that runs beside the student, and the one forward pass that gives logits and features of any timm model."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.loader import adapt_to_chs
from timm.models import get_model_input_config
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from timm_igkd.errors import InputError, InputTypeError, check_count, check_whole, listed
from timm_igkd.eval_mode import bare_model, check_model, eval_mode, in_precision_of
from timm_igkd.feature_maps import is_forward


class LiveTeacher(nn.Module):
    """A frozen model fed with the student's input, brought to the teacher's normalisation and size.

    Args:
        model: the teacher; frozen in place (requires_grad False, eval mode).
        student: whose `pretrained_cfg` says how the input is normalised.
        attention_index: the entry of `forward_intermediates` returned as features; None where none is asked for.
        input_size: (H, W) fed to the model, by default its own.

    Raises:
        InputError: a model without mean and std in its `pretrained_cfg`.
    """

    student_mean: Tensor
    student_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        attention_index: int | None = None,
        input_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        # A wrapper that changes how a model is run stays on; timm's own teacher is no model of its kind.
        model = bare_model(model) if isinstance(model, DistillationTeacher) else model
        self.model: Any = model.requires_grad_(False).eval()
        self.attention_index = attention_index
        self.input_size = own_input_size(model) if input_size is None else _checked_size(input_size)
        student_statistics, statistics = _mean_std("student", student), _mean_std("teacher", model)
        self._same_normalization = student_statistics == statistics
        for name, values in zip(
            ("student_mean", "student_std", "mean", "std"), (*student_statistics, *statistics), strict=True
        ):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "LiveTeacher":
        """Stay in eval mode, whoever asks: batch statistics and dropout of a teacher never run in training mode."""
        return super().train(False)

    def describe(self) -> str:
        """Return how the input is prepared, for the log."""
        size = "any size" if self.input_size is None else "x".join(map(str, self.input_size))
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"{size}, mean {[round(x, 3) for x in mean]}, std {[round(x, 3) for x in std]}"

    def prepare_input(self, input: Tensor) -> Tensor:
        """Return the student's normalised `input` (B, C, H, W) as the teacher expects it."""
        x = input.float()
        if not self._same_normalization:
            pixels = x * self.student_std + self.student_mean
            x = (pixels - self.mean) / self.std
        if self.input_size is not None and tuple(x.shape[-2:]) != self.input_size:
            x = F.interpolate(x, self.input_size, mode="bilinear", align_corners=False, antialias=True)
        return in_precision_of(self.model, x)

    @torch.no_grad()
    def forward(
        self, input: Tensor, logits: bool = True, features: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's logits and features, None for what is not asked for.

        Args:
            input: (B, C, H, W) normalised for the student.
            logits: whether to compute the (B, classes) logits.
            features: whether to return the (B, C', H', W') entry at `attention_index`.
        """
        x = self.prepare_input(input)
        if not features:
            return check_logits("teacher", self.model(x)), None
        bare = bare_model(self.model)
        if logits:
            return forward_with_features(bare, x, self.attention_index)
        indices = [self.attention_index]
        (entry,) = bare.forward_intermediates(
            x, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return None, entry


def check_has_classifier(model: nn.Module, role: str) -> None:
    """Raise InputError where a model's outputs are features, as timm makes it of num_classes 0."""
    if getattr(bare_model(model), "num_classes", None) == 0:
        raise InputError(f"the {role} has no classifier, its outputs are features; build it with num_classes above 0")


def check_logits(role: str, output: Any) -> Tensor:
    """Return a model's output; raise InputTypeError unless it is one tensor of logits."""
    if not isinstance(output, Tensor):
        raise InputTypeError(
            f"the {role} must return one tensor of logits, got {type(output).__name__}; wrap it so that it does (a "
            "distilled DeiT: set_distilled_training(False))"
        )
    if output.ndim != 2 or not output.is_floating_point():
        raise InputTypeError(
            f"the {role} must return logits (images, classes), floating, got {str(output.dtype)[6:]} of shape "
            f"{tuple(output.shape)}; wrap it so that it does"
        )
    return output


def forward_with_features(model: Any, input: Tensor, index: int | None) -> tuple[Tensor, Tensor]:
    """Return a timm model's logits and its intermediate entry `index` as (B, C, H, W), in one forward pass."""
    final, (entry,) = model.forward_intermediates(input, indices=[index], output_fmt="NCHW")
    return model.forward_head(final), entry


@torch.no_grad()
def resolve_attention_index(role: str, model: Any, index: int | None) -> int:
    """Return a checked, non-negative index into the model's intermediates; the middle one for None.

    One image is sent through the model in eval mode, since only that tells how many entries there are and whether
    `forward_intermediates` leads to the same logits as `forward`, on which training with it depends.

    Args:
        role: "student" or "teacher", for messages and the name of the option.
        model: a timm model.
        index: an entry of `forward_intermediates`, counted from the end where negative.

    Raises:
        InputError: a model attention transfer cannot read, or an index outside.
    """
    model = bare_model(model)
    name = type(model).__name__
    remedy = f"choose another {role} (most timm models qualify), or set attention_loss_weight=0"
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"attention transfer needs forward_intermediates, which {role} {name} lacks; {remedy}")
    image = probe_image(model)
    with eval_mode(model):
        final, entries = model.forward_intermediates(image, output_fmt="NCHW")
        agrees = is_forward(model, image, model.forward_head(final))
    if not agrees:
        raise InputError(
            f"forward_intermediates of {role} {name} must lead to the logits of its forward, got others; {remedy}"
        )
    index = len(entries) // 2 if index is None else check_whole(f"{role}_attention_index", index)
    if not -len(entries) <= index < len(entries):
        raise InputError(
            f"{role}_attention_index must be in [{-len(entries)}, {len(entries) - 1}] for {name}, got {index}; "
            "leave it out for the middle entry"
        )
    if entries[index].ndim != 4:
        raise InputError(
            f"attention transfer needs feature maps, got shape {tuple(entries[index].shape)} at entry {index} of "
            f"{role} {name}; {remedy}"
        )
    if entries[index].shape[-2:].numel() == 1:
        raise InputError(
            f"attention transfer needs features at several positions, got shape {tuple(entries[index].shape)} at entry "
            f"{index} of {role} {name}; take larger images, an earlier entry as {role}_attention_index, or "
            "attention_loss_weight=0"
        )
    return index % len(entries)


def _checked_size(size: Any) -> tuple[int, int]:
    sides = listed("teacher_input_size", size, "numbers")
    if len(sides) != 2:
        raise InputError(f"teacher_input_size must be (height, width), got {size}")
    height, width = (check_count("each of teacher_input_size", side) for side in sides)
    return height, width


def own_input_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the (H, W) a model is built for, an `img_size` given to `timm.create_model` included; None if unknown."""
    model = bare_model(model)
    if not (getattr(model, "pretrained_cfg", None) or {}).get("input_size"):
        return None
    height, width = get_model_input_config(model)["input_size"][-2:]
    return int(height), int(width)


def check_pair(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise unless the two are models, the student one with weights, that read the same channels and share none."""
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            check_model(role, model)
    if next(student.parameters(), None) is None:
        raise InputError(f"the student {type(student).__name__} has no parameters to train; make one with weights")
    if teacher is None:
        return
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise InputError("teacher and student must not share weights, since the teacher is frozen; pass a copy")
    channels = [getattr(bare_model(model), "in_chans", None) for model in (student, teacher)]
    if None not in channels and channels[0] != channels[1]:
        raise InputError(
            f"student and teacher must read the same channels, got in_chans {channels[0]} and {channels[1]}; "
            "create one of them with in_chans of the other"
        )


def probe_image(model: nn.Module) -> Tensor:
    """Return an image (1, C, H, W) of a model's own size, to see what the model does with one."""
    like = next(model.parameters(), torch.empty(0))  # a teacher may have none
    shape = (1, getattr(model, "in_chans", 3), *(own_input_size(model) or (224, 224)))
    return torch.linspace(-1, 1, shape[1] * shape[2] * shape[3]).view(shape).to(like.device, like.dtype)


def _mean_std(role: str, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the normalisation a model's input has, one value per channel."""
    model = bare_model(model)
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None:
        raise InputError(
            f"the {role}'s pretrained_cfg must name the mean and std of its input, which {type(model).__name__} lacks; "
            f"set {role}.pretrained_cfg = {{'mean': ..., 'std': ..., 'input_size': ...}}"
        )
    channels = getattr(model, "in_chans", None) or len(mean)
    return tuple(adapt_to_chs(tuple(mean), channels)), tuple(adapt_to_chs(tuple(std), channels))
