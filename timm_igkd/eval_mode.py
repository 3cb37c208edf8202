"""Any torch model: without its wrappers, copied, in eval mode and in its own precision meanwhile."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_igkd.errors import InputError, check_kind, first_line


def bare_model(model: Any) -> Any:
    """Return the model inside DataParallel, DDP, torch.compile, an average of weights or timm's DistillationTeacher.

    By their types: timm's `unwrap_model` takes any attribute `module` for a wrapped model.
    """
    # here: timm's import registers architectures that need this module whole (timm_igkd/__init__.py)
    from timm.task.distillation import DistillationTeacher
    from timm.utils import ModelEmaV2, ModelEmaV3

    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(model, DistillationTeacher):
            model = model.model
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            # torch.compile's wrapper, whose type is slow to import
            model = model._modules["_orig_mod"]
        else:
            return model


def check_model(role: str, model: object) -> None:
    """Raise InputTypeError unless something is a torch module."""
    check_kind(role, model, nn.Module, "a model", "make it with timm.create_model or load_model")


def preprocessed_model(role: str, model: Any) -> Any:
    """Return the bare model; an error that calls it by its role unless it is one that says how images are fed to it.

    Raises:
        InputTypeError: no torch module. InputError: no `pretrained_cfg`.
    """
    check_kind(f"the {role}", model, nn.Module, "a torch module", "load it with load_model")
    bare = bare_model(model)
    if not getattr(bare, "pretrained_cfg", None):
        raise InputError(
            f"the {role} must carry its preprocessing as timm models do, found no pretrained_cfg; set "
            "model.pretrained_cfg = {'input_size': ..., 'mean': ..., 'std': ...}"
        )
    return bare


def in_precision_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return images in the floating type of a model's first floating parameter, as they are where it has none."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.to(own)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy; of tensors that were computed, as old weight norm leaves them, which `deepcopy` refuses, too.

    The copy computes in the precision of its weights: Accelerate's autocast is taken off.
    """
    computed: dict[int, Any] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                computed[id(value)] = value.detach().clone()
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                collect(value)
    copied = copy.deepcopy(model, computed)
    _take_off_autocast(copied)
    return copied


def _take_off_autocast(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Take off the mixed precision that `accelerator.prepare` put around forward; return what puts it back."""
    taken = []
    for module in model.modules():
        own = vars(module)
        if "_original_forward" in own:
            taken.append((module, {name: own.pop(name) for name in ("forward", "_original_forward")}))
            original = taken[-1][1]["_original_forward"]
            if getattr(original, "__func__", original) is not type(module).forward:
                own["forward"] = original  # one that the model had before
    return taken


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient, and give each its own wish back.

    `FlopCounterMode` registers a gradient hook on every module's input that requires grad, and fails under `no_grad`
    where that is a view of a parameter; so parameters require none meanwhile.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def usable_device(name: str, device: torch.device | str) -> torch.device:
    """Return the device that an argument names; an InputError unless this process can make a tensor there."""
    check_kind(name, device, (str, torch.device), "a torch device", "give a text such as cpu or cuda:0")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second: torch without CUDA
        raise InputError(f"{name} {str(device)!r} cannot be used here: {first_line(error)}; give cpu") from error
    if found.type == "meta":  # a model that went there has lost its weights
        raise InputError(f"{name} 'meta' holds no values; give cpu")
    return found


@contextmanager
def eval_mode(*models: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Put models into eval mode, on `device` where one is given; give all their modules their own mode and device back.

    They compute in the precision of their weights, as when loaded again: Accelerate's autocast is off meanwhile.
    `model.train(was_training)` would not do: a model that trains may hold batch norms that were frozen in eval mode.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    homes = [next((parameter.device for parameter in model.parameters()), None) for model in models]
    autocasts = [taken for model in models for taken in _take_off_autocast(model)]
    try:
        for model in models:
            model.eval() if device is None else model.to(device).eval()
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            if device is not None and home is not None:
                model.to(home)
        for module, training in modes:
            module.training = training
        for module, own in autocasts:
            vars(module).update(own)


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute float32 in float32 meanwhile, whatever the caller's autocast or shorter products would make of it.

    These are cuDNN's default, TF32, whose maps are 4e-2 away, and what `torch.set_float32_matmul_precision` and
    `torch.backends` ask for. Autocast is the thread's own: the engine's workers have none.
    """
    with torch.autocast(device.type, enabled=False), _FULL_PRODUCTS.get(device.type, nullcontext()):
        yield


class _FullProducts:
    """A context without the settings by which torch computes float32 products in fewer bits.

    They are the process's, not the thread's: the first thread to enter takes them off, the last to leave puts them
    back. Settings that are "ieee" or "none" are left alone: once `fp32_precision` is set, torch's older getters raise.
    """

    def __init__(self, *settings: Any) -> None:
        self._settings, self._shorter = settings, list[tuple[Any, str]]()
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                found = [(setting, setting.fp32_precision) for setting in self._settings]
                self._shorter = [(setting, value) for setting, value in found if value not in ("none", "ieee")]
                for setting, _ in self._shorter:
                    setting.fp32_precision = "ieee"

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for setting, value in self._shorter:
                    setting.fp32_precision = "none"  # a value that it had of its parent goes on following that one
                    if setting.fp32_precision != value:
                        setting.fp32_precision = value


_backends: Any = torch.backends
_FULL_PRODUCTS: dict[str, Any] = {
    "cpu": _FullProducts(_backends.mkldnn.conv, _backends.mkldnn.matmul),
    "cuda": _FullProducts(_backends.cudnn.conv, _backends.cuda.matmul),
}
