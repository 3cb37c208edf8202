"""The teacher's copy that is attributed: any classifier, whatever it is wrapped in, made of and computed with."""

import copy
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from timm_igkd.attribution.chunk_pool import one_thread
from timm_igkd.attribution.lighter_model import outputs_and_gradient
from timm_igkd.errors import InputError, RunError, first_line
from timm_igkd.eval_mode import bare_model, check_model, copy_model, exact_arithmetic
from timm_igkd.random_streams import fixed_noise

_NEEDED = ("input_size", "mean", "std")


def teacher_copy(teacher: Any) -> Any:
    """Return a copy of a teacher to attribute: bare, float32, frozen, in eval mode, with plain weights, tried once.

    Args:
        teacher: a classifier with timm's `pretrained_cfg` (input_size, mean, std), for 1 or 3 channels. DataParallel,
            DDP, torch.compile and timm's DistillationTeacher are taken off; half and double precision become float32;
            parametrized, weight-normed, spectral-normed and pruned weights are computed once.

    Raises:
        InputTypeError: no torch module.
        InputError: no `pretrained_cfg`, other channels, outputs that cannot be attributed, or torch's inference mode.
        RunError: outputs that are not finite.
    """
    if torch.is_inference_mode_enabled():  # also for logits alone: the copy is tried with a gradient
        raise InputError(
            "a teacher is copied and tried with a gradient, which torch.inference_mode() has none of; use "
            "torch.no_grad()"
        )
    bare = bare_model(teacher)
    check_model("teacher", bare)
    config, name = getattr(bare, "pretrained_cfg", None) or {}, type(bare).__name__
    if missing := [key for key in _NEEDED if config.get(key) is None]:
        raise InputError(
            f"the teacher's pretrained_cfg must say how images are fed to it, {name} has no {missing[0]}; set "
            "teacher.pretrained_cfg = {'input_size': (3, height, width), 'mean': ..., 'std': ...}"
        )
    shape = tuple(get_model_input_config(bare)["input_size"])
    if shape[0] not in (1, 3):
        raise InputError(
            f"the teacher {name} reads {shape[0]} channels, images have 3, or 1 as grey; take one with in_chans=3 or 1"
        )
    copied = copy_model(bare).float().requires_grad_(False).eval()
    copied.pretrained_cfg = bare.pretrained_cfg  # a GraphModule's copy loses it
    _make_weights_plain(copied)
    _try(copied, shape)
    return copied


@torch.no_grad()
def answer_to_noise(teacher: Any) -> tuple[float, ...]:
    """Return what a teacher's copy answers to a fixed image: at most 16 of its logits, in float32 on the CPU, 5 digits.

    Two models of the same tensors that answer differently compute differently: their arguments are others. By one
    thread, for it stands in the manifest, whose bytes do not depend on their number.

    Args:
        teacher: of `teacher_copy`.
    """
    shape = tuple(get_model_input_config(teacher)["input_size"])
    image = fixed_noise(1, *shape)
    is_there = all(tensor.device.type == "cpu" for tensor in teacher.parameters())
    with one_thread(), exact_arithmetic(image.device):
        logits = (teacher if is_there else copy.deepcopy(teacher).to("cpu"))(image)[0]
    kept = torch.linspace(0, len(logits) - 1, min(16, len(logits))).round().long()
    return tuple(float(f"{logit:.5g}") for logit in logits[kept].tolist())


def answers_alike(there: tuple[float, ...] | None, here: tuple[float, ...] | None) -> bool:
    """Say whether two answers to the fixed image are the same but for rounding, to 1e-3 of the largest; None is any."""
    if there is None or here is None:
        return True
    largest = max(map(abs, (*there, *here)), default=0.0)
    pairs = zip(there, here, strict=False)
    return len(there) == len(here) and all(abs(a - b) <= 1e-3 * largest for a, b in pairs)


def _make_weights_plain(model: nn.Module) -> None:
    """Compute once what would be computed in every pass, so that a layer's weight is what it seems."""
    for module in list(model.modules()):
        if is_parametrized(module):
            # torch takes the weight off the class that it made for this layer, which a copy shares with its original
            own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                remove_parametrizations(module, name, leave_parametrized=True)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                hook.remove(module)
                del module._forward_pre_hooks[key]
    model.requires_grad_(False)


def _try(model: Any, shape: tuple[int, ...]) -> None:
    """Raise unless the model gives an image logits that have a gradient and are its own; let it say how many."""
    name, device = type(model).__name__, next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    images = fixed_noise(2, *shape).to(device)
    remedy = "choose another img_size, or set a pretrained_cfg whose input_size it reads"
    try:
        with torch.no_grad(), exact_arithmetic(device):
            found = model(images[:1])
            together = model(images)
        remedy = "it must be differentiable in float32 at this input_size, its pretrained_cfg's"
        is_logits = isinstance(found, Tensor) and found.shape[:-1] == (1,) and found.is_floating_point()
        if is_logits:
            outputs_and_gradient(model, images[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise InputError(
            f"the teacher {name} cannot be attributed on an image of {list(shape)} ({first_line(error)}); {remedy}"
        ) from error
    if not is_logits:
        is_tensor = isinstance(found, Tensor)
        kind = f"{str(found.dtype)[6:]} of shape {list(found.shape)}" if is_tensor else type(found).__name__
        raise InputError(
            f"the teacher {name} must return logits [images, classes], got {kind}; wrap it so that it does"
        )
    if not torch.isfinite(found).all():
        raise RunError("the teacher's outputs are not finite; check its weights and normalisation")
    if not torch.allclose(together[:1], found, rtol=0, atol=1e-2 * float(found.abs().max())):
        raise InputError(
            f"the teacher {name} answers an image differently beside another one; give its batch norms running "
            "statistics (track_running_stats=True)"
        )
    if not isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = found.shape[1]
    if model.num_classes != found.shape[1]:
        raise InputError(
            f"the teacher {name} has num_classes {model.num_classes}, but returns {found.shape[1]} outputs; give a "
            "classifier whose num_classes is right"
        )
