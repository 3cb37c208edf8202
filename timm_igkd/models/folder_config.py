"""config.json of a timm folder: read once, checked, wrong in one line."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.transforms_factory import str_to_interp_mode

from timm_igkd.errors import InputError, MissingFileError, nearest
from timm_igkd.files import read_mapping
from timm_igkd.models.arguments import check_model_arguments

LARGEST_SIDE = 16_384
"""Pixels of an input's side; one such image takes 3 GB."""


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder.

    Raises:
        MissingFileError: no folder, no file. InputError: whatever is wrong with the file, in one line.
    """
    if not os.path.isdir(folder):
        raise MissingFileError(f"no model folder {str(folder)!r}; expected a timm folder with config.json and weights")
    path = folder / "config.json"
    if not path.is_file():
        if names := models_of_run(folder):
            raise MissingFileError(f"{str(folder)!r} is a run's folder, which holds its models; write {names}")
        raise MissingFileError(
            f"model folder {str(folder)!r} has no config.json; save the model with timm's save_for_hf"
        )
    where = f"config.json in {str(folder)!r}"
    config = read_mapping(path)
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{where} names no architecture; save the model with timm")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise InputError(f"{where} names the unknown model {_shown(architecture)}{hint}; correct it")
    arguments = config.get("model_args") or {}
    check_model_arguments(arguments, f"model_args of {where}")
    num_classes, channels = _check_num_classes(config, where), arguments.get("in_chans")
    check_preprocessing(config.get("pretrained_cfg", {}), f"pretrained_cfg of {where}", num_classes, channels)
    _check_names(config.get("label_names"), where, num_classes)
    return config


def models_of_run(folder: Path) -> str:
    """Return how the models in a run's folder are named, the student first; empty for a model's folder or another."""
    paths = [] if (folder / "config.json").exists() else [folder / name for name in ("student", "teacher")]
    return " or ".join(f"local-dir:{path}" for path in paths if (path / "config.json").is_file())


def _check_num_classes(config: dict[str, Any], where: str) -> int | None:
    """Return the number of outputs, None where it is timm's default.

    All must say the same: where they differ, timm puts a new classifier of random weights on the model.
    """
    preprocessing = config.get("pretrained_cfg")
    places = (config, config.get("model_args") or {}, preprocessing if isinstance(preprocessing, dict) else {})
    found = [place["num_classes"] for place in places if place.get("num_classes") is not None]
    if "num_classes" in config:  # timm takes it instead of the innermost
        found = found[:2]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 or n != found[0] for n in found):
        raise InputError(
            f"{where}: num_classes must be one whole number, the outputs of the weights, got {_shown(found)}"
        )
    return found[0] if found else None


def _shown(value: Any) -> str:
    return repr(value)[:80]


def check_preprocessing(cfg: Any, where: str, num_classes: int | None = None, channels: int | None = None) -> None:
    """Raise InputError unless what decides how an image is fed to the model is sound; absent leaves timm's default.

    Args:
        cfg: timm's `pretrained_cfg`.
        where: how a message calls it.
        num_classes: outputs of the model, to which the names that it holds must belong; None: not known.
        channels: that the model reads; None: those of the input size.
    """
    if not isinstance(cfg, dict):
        raise InputError(f"{where} must hold settings by name, got {type(cfg).__name__}; save the model with timm")
    size = cfg.get("input_size", (3, 224, 224))
    if not (_are_numbers(size, {3}) and all(isinstance(n, int) and 0 < n <= LARGEST_SIDE for n in size)):
        raise InputError(
            f"{where}: input_size must be (channels, height, width), whole numbers of at most {LARGEST_SIDE}, got "
            f"{_shown(size)}"
        )
    counts = {1, 3, size[0], channels or size[0]}  # timm keeps three also where it builds a model of other channels
    for name in ("mean", "std"):
        values = cfg.get(name, (1.0,))
        if not (_are_numbers(values, counts) and is_statistic(name, values)):
            above = " above 0 in float32" if name == "std" else ""
            raise InputError(
                f"{where}: {name} must be one number{above}, or one for each of {size[0]} channels, got "
                f"{_shown(values)}"
            )
    _check_crop(cfg.get("crop_pct"), size[1:], where)
    interpolation = cfg.get("interpolation")
    if interpolation is not None:
        try:
            str_to_interp_mode(interpolation)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{where}: interpolation must be one that timm knows, got {_shown(interpolation)}"
            ) from error
    _check_names(cfg.get("label_names"), where, num_classes)


def is_statistic(name: str, values: Sequence[float]) -> bool:
    """Return whether numbers can be the "mean" or "std" of pixels: in float32 finite, what is divided by above 0."""
    limits = torch.finfo(torch.float32)
    lowest = limits.tiny if name == "std" else limits.min
    return all(lowest <= value <= limits.max for value in values)


def _check_crop(share: Any, sides: Sequence[int], where: str) -> None:
    """Check the share of a resized image that is read: for input of these sides it is resized to their size by it."""
    if share is None:
        return
    if not (_is_number(share) and 0 < share <= 10):
        raise InputError(f"{where}: crop_pct must be a number above 0, at most 10, got {_shown(share)}")
    if not (share <= min(sides) and max(sides) <= 2 * LARGEST_SIDE * share):
        raise InputError(
            f"{where}: crop_pct must be a share by which an image read at {sides[0]} x {sides[1]} pixels is resized to "
            f"1 to {2 * LARGEST_SIDE} pixels, got {_shown(share)}"
        )


def _check_names(names: Any, where: str, num_classes: int | None) -> None:
    """Check the classes' names: texts, listed or by the number of their output."""
    if names is None:
        return
    found = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"label_names of {where} must be a list of texts, got {str(names)[:80]}; correct or remove it")
    most = num_classes or sys.maxsize
    if isinstance(names, list) and len(names) > most:
        raise InputError(
            f"label_names of {where} are {len(names)}, expected at most one for each of the {most} outputs; correct or "
            "remove them"
        )
    if isinstance(names, dict):
        outputs = {int(key) for key in names if str(key).isdecimal()}
        if len(outputs) < len(names) or max(outputs, default=0) >= most:
            raise InputError(
                f"label_names of {where} must be by the number of an output, each once, from 0 on, got "
                f"{_shown(list(names))}; correct or remove it"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _are_numbers(values: Any, counts: set[int]) -> bool:
    return isinstance(values, list | tuple) and len(values) in counts and all(map(_is_number, values))
