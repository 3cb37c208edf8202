"""The accelerator of a run: its device, precision and trackers, and the memory format of what runs on it."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs, broadcast_object_list
from torch import nn

from timm_igkd.distillation.live_teacher import probe_image
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.environment import LONGEST_WAIT
from timm_igkd.errors import InputError, RunError, UserError, first_line
from timm_igkd.eval_mode import eval_mode
from timm_igkd.rounded_bfloat16 import round_where_missing

Result = TypeVar("Result")
_PRECISIONS = ["no", "bf16", "fp16"]
_DIVIDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_FIRST_SCALES: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def create_accelerator(trackers: Sequence[str], project_dir: str | Path) -> Accelerator:
    """Return the accelerator of the launched process, on the CPU where there is no CUDA device.

    Asked for bfloat16 on a CPU that lacks it, autocast of this process rounds to it and computes in float32, see
    `timm_igkd.rounded_bfloat16`.

    Args:
        trackers: packages that log the run.
        project_dir: folder where trackers that write files put them.

    Raises:
        InputError: a tracker is not installed (Accelerate would leave it out), or the launcher asks for what cannot be
            done here: another precision, a model divided among processes, compilation or accumulation of its own.
    """
    _check_trackers(trackers)
    try:
        accelerator = Accelerator(
            log_with=list(trackers) or None,
            project_dir=project_dir,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    except (ValueError, ImportError) as error:  # such as fp8 without its packages
        raise InputError(
            f"the launcher's settings cannot be used ({first_line(error)}); launch without them"
        ) from error
    _check_launch(accelerator)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and round_where_missing():
        accelerator.print(
            "note: this processor has no bfloat16; products are computed in float32 and rounded, at float32's speed",
            file=sys.stderr,
        )
    return accelerator


def _check_launch(accelerator: Accelerator) -> None:
    """Raise InputError for what a launcher, or ACCELERATE_* of the environment, asks for and would not be done."""
    if (kind := accelerator.distributed_type) in _DIVIDING:
        raise InputError(
            f"the launcher asks for {kind.value}, which divides a model among processes, and here each has the whole; "
            "launch without it: accelerate launch --multi_gpu, or another --config_file"
        )
    if (precision := accelerator.mixed_precision) not in _PRECISIONS:
        raise InputError(f"mixed_precision {precision!r} is unknown here; give the launcher one of {_PRECISIONS}")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision fp16 needs a GPU, and this process has none; give the launcher bf16 or no")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError(
            "the launcher asks for dynamo_backend, which is not looked at here; use --compile in its place"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            "the launcher asks for gradient accumulation, which is not looked at here; use --grad-accum-steps in its "
            "place"
        )


def on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Return to every process what a function returns to the main one, which alone calls it; its UserError ends all."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = function()
        except UserError as error:
            found[1] = error
    result, failure = broadcast_object_list(found)
    if failure is not None:
        raise failure
    return result


def renew_scale(accelerator: Accelerator) -> None:
    """Scale gradients of fp16 as at first: trainings that share an accelerator begin alike."""
    if (scaler := accelerator.scaler) is not None:
        scaler.load_state_dict(_FIRST_SCALES.setdefault(scaler, scaler.state_dict()))


def _check_trackers(names: Sequence[str]) -> None:
    there = {str(kind) for kind in get_available_trackers()}
    if missing := [name for name in names if name not in there]:
        packages = " ".join(missing)
        raise InputError(f"trackers not installed: {packages}; pip install {packages}, or leave them out")


def use_channels_last(task: IGDistillationTask) -> torch.memory_format:
    """Lay student and teacher out channels last, which is convolved faster, unless one cannot read such images.

    Returns:
        the memory format in which they are now; some models reshape by `view`, for which strides must be those of NCHW.
    """
    models: list[Any] = [task.get_eval_model(), *([] if task.teacher is None else [task.teacher.model])]
    # of convolutions alone: `to` would ask it of every weight, and a lambda layer's has five dimensions
    nn.utils.convert_conv2d_weight_memory_format(task, torch.channels_last)
    try:
        with eval_mode(*models):
            for model in models:
                model(probe_image(model).contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        task.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def launch_of(accelerator: Accelerator, compile: bool) -> dict[str, Any]:
    """Return what `accelerate launch` decides, and whether the model is compiled."""
    found = {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    return found | {"compile": compile}


def launch_change(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first thing in which two launches differ, in words; None where they are alike in what both tell."""
    changed = (name for name in now if earlier.get(name, now[name]) != now[name])
    return next((f"{name} = {earlier[name]!r}, now it is {now[name]!r}" for name in changed), None)


def command_line(launch: Mapping[str, Any]) -> str:
    """Return the command that began this process, with what its launcher was told.

    Args:
        launch: see `launch_of`.
    """
    program, *arguments = sys.argv
    is_launched = launch["num_processes"] > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    launcher = ["accelerate", "launch", "--num_processes", str(launch["num_processes"])]
    launcher += ["--mixed_precision", str(launch["mixed_precision"])]
    path = Path(program)
    if path.name == "__main__.py":  # of a package, by -m
        return shlex.join([*(launcher if is_launched else ["python"]), "-m", path.parent.name, *arguments])
    if is_launched:
        return shlex.join([*launcher, program, *arguments])
    return shlex.join([*(["python"] if path.suffix == ".py" else []), program, *arguments])


@contextmanager
def telling_of_memory(label: str, batch_size: int) -> Iterator[None]:
    """Turn what torch raises where memory is short into a RunError with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{label} is out of GPU memory with {batch_size} images a batch; give a smaller --batch-size, with "
            "--grad-accum-steps for the same step, and another --name"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # torch has no type of its own for it
            raise
        raise RunError(
            f"a process that loads images for {label} was killed ({first_line(error)}), most often for want of memory; "
            "lower --workers or give it more shared memory (/dev/shm), then go on with --resume"
        ) from error
