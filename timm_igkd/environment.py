"""What a run ran on: package versions and hardware, saved beside every result."""

import hashlib
import os
import platform
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch

from timm_igkd.rounded_bfloat16 import computes_in_float32
from timm_igkd.version import __version__

LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for one that works alone: torch's own 10 minutes of GPUs are less than much data takes."""

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "captum",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "datasets",
    "numpy",
    "pillow",
    "pyarrow",
)


def environment() -> dict[str, str | int | list[str] | None]:
    """Return versions and hardware of this process; plain values, ready for JSON and YAML.

    Keys: timm_igkd, python, one per name in `PACKAGES` (None where not installed), platform, cpu, logical_cores,
    torch_threads, gpus (names of the visible CUDA devices); where autocast on the CPU computes bfloat16 with float32,
    bfloat16, which says so.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "timm_igkd": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    } | ({"bfloat16": "products in float32, rounded"} if computes_in_float32() else {})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Return the processor's model name; the architecture where the system does not tell more."""
    return _first_processor().get("model name", "") or platform.processor() or platform.machine()


def processor() -> str:
    """Return what tells processors apart that machines for hire call by one name: family, model, a hash of the flags.

    Empty where the system does not tell them.
    """
    found = _first_processor()
    if not {"cpu family", "model", "flags"} <= set(found):
        return ""
    flags = hashlib.sha256(" ".join(sorted(found["flags"].split())).encode()).hexdigest()[:8]
    return f"family {found['cpu family']}, model {found['model']}, flags {flags}"


def _first_processor() -> dict[str, str]:
    """Return what Linux says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    entries = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in entries}
