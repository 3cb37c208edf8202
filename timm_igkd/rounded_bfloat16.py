"""bfloat16 on x86 processors without it: float32's arithmetic, rounded where autocast would compute in bfloat16.

torch's own convolutions in bfloat16 are slow there, and now and then give garbage as weight gradients.
A bfloat16 unit multiplies exactly and adds in float32; so does this, but for the order of the sum. What goes into a
product and what comes out of it is rounded to bfloat16, gradients too, at float32's speed and float32's memory or more.
Two things are not the unit's: attention keeps its probabilities in float32, and a weight that is used twice in a pass
has the sum of its gradients rounded once more there.
"""

import importlib
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

PRODUCTS = (
    *("addbmm", "addmm", "baddbmm", "bmm", "linalg_vecdot", "linear", "matmul", "mm", "scaled_dot_product_attention"),
    *("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "_native_multi_head_attention"),
)
"""What autocast computes in its lower precision on a CPU, as overloads of torch.ops.aten; recurrent layers left out."""

_registered: list[torch.library.Library] = []


def cpu_has_bfloat16() -> bool:
    """Return whether this processor computes bfloat16 itself; true where this cannot be told (not x86)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def round_where_missing() -> bool:
    """Have autocast on the CPU round and compute in float32 where this processor lacks bfloat16; return whether."""
    if not cpu_has_bfloat16():
        compute_in_float32()
    return computes_in_float32()


@contextmanager
def rounded_where_missing() -> Iterator[None]:
    """Do as `round_where_missing` for some time."""
    was_on = computes_in_float32()
    round_where_missing()
    try:
        yield
    finally:
        if not was_on:
            compute_in_bfloat16()


def compute_in_float32() -> None:
    """Have autocast on the CPU round to its precision and compute in float32, for the rest of the process.

    torch.compile keeps the roundings too, which inductor otherwise takes for superfluous; not where a CUDA device is.
    """
    if _registered:
        return
    _keep_roundings_in_compiled(not torch.cuda.is_available())  # the setting is of a GPU's compiled code too
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*verriding")  # which is meant
        for product in PRODUCTS:
            library.impl(product, _rounded(product), "AutocastCPU")
    _registered.append(library)


def computes_in_float32() -> bool:
    """Return whether `compute_in_float32` was called."""
    return bool(_registered)


def compute_in_bfloat16() -> None:
    """Take `compute_in_float32` back."""
    while _registered:
        _registered.pop()._destroy()
        _keep_roundings_in_compiled(False)


def _keep_roundings_in_compiled(keep: bool) -> None:
    config: Any = importlib.import_module("torch._inductor.config")  # seconds, for this alone
    config.emulate_precision_casts = keep


def _rounded(product: str) -> Callable[..., Any]:
    name, _, overload = product.partition(".")
    compute = getattr(getattr(torch.ops.aten, name), overload or "default")

    def rounded(*args: Any, **kwargs: Any) -> Any:
        lower = torch.get_autocast_dtype("cpu")

        def round_in(value: Any) -> Any:
            is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(lower).to(torch.float32) if is_cast else value

        def round_out(value: Any) -> Any:
            return value.to(lower) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

        with torch.autocast("cpu", enabled=False):
            return tree_map(round_out, compute(*tree_map(round_in, args), **tree_map(round_in, kwargs)))

    return rounded
