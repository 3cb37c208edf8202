"""The accelerator of a run: its device, precision and trackers, refused where they would not do what was asked."""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from timm_igkd.errors import InputError


def create_accelerator(trackers: Sequence[str], project_dir: str | Path) -> Accelerator:
    """Return the accelerator of the launched process, on the CPU where there is no CUDA device.

    Args:
        trackers: packages that log the run.
        project_dir: folder where trackers that write files put them.

    Raises:
        InputError: a tracker is not installed (Accelerate would leave it out), or the launcher asked for bfloat16 on a
            CPU that computes it in software.
    """
    _check_trackers(trackers)
    accelerator = Accelerator(
        log_with=list(trackers) or None, project_dir=project_dir, cpu=not torch.cuda.is_available()
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not cpu_has_bfloat16():
        raise InputError(
            "this processor has no bfloat16 of its own, and torch's convolutions in it now and then give garbage as "
            "weight gradients; use accelerate launch --mixed_precision no"
        )
    return accelerator


def cpu_has_bfloat16() -> bool:
    """Return whether this processor computes bfloat16 itself; true where this cannot be told (not x86)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _check_trackers(names: Sequence[str]) -> None:
    there = {str(kind) for kind in get_available_trackers()}
    if missing := [name for name in names if name not in there]:
        packages = " ".join(missing)
        raise InputError(f"trackers not installed: {packages}; pip install {packages}, or leave them out")
