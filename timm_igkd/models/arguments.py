"""What a model may be built with: arguments of its architecture; never an address, never another way to load weights.

A saved student's config.json comes from anywhere, and timm hands its `model_args` to `timm.create_model`.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.eval_mode import bare_model

DEEPEST = 8
_LOADING = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn checkpoint_path cache_dir "
    "model_variant feature_cfg features_only features scriptable exportable no_jit kwargs_filter url file state_dict "
    "hf_hub_id hf_hub_filename source custom_load".split()
)
"""Arguments of timm's factories that load something or return something else than the classifier."""
NO_TEST_VIEW = {"test_input_size": None, "test_crop_pct": None}
"""Entries of `pretrained_cfg` where a model is measured at a view of ours: timm's scripts are to test at no other."""
_ADDRESSES = ("hf-hub:", "hf_hub:", "local-dir:", "file:", "~")
_SHARES = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate")


def check_model_arguments(arguments: Any, where: str) -> None:
    """Raise InputError unless all are arguments of an architecture, at every depth.

    Args:
        arguments: name -> value; nested mappings and lists are looked through.
        where: how a message calls the place they come from.
    """
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where} must be arguments by name, got {type(arguments).__name__}; correct or remove it")
    _check_depth(arguments, where, DEEPEST)
    for name, value in arguments.items():
        if not isinstance(name, str):
            raise InputError(f"{where} must be arguments by name, got the name {name!r}; correct it")
        if name in _LOADING:
            raise InputError(
                f"{where} has {name!r}, which is no argument of an architecture but of loading; leave it out, and give "
                "weights by a checkpoint or a model's name"
            )
        if name in _SHARES:
            _check_share(name, value, where)
        _check_value(value, f"{where}: {name}")


def _check_depth(value: Any, where: str, left: int) -> None:
    if left == 0:
        raise InputError(f"{where} is nested more than {DEEPEST} deep, expected arguments by name; correct it")
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        _check_depth(part, where, left - 1)


def _check_share(name: str, value: Any, where: str) -> None:
    if value is None:
        return
    if name == "drop_path_rate" and isinstance(value, list | tuple):  # of each stage
        for part in value:
            _check_share(name, part, where)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{where}: {name} must be in [0, 1), got {value!r}")


def _check_value(value: Any, where: str) -> None:
    """Look through one value: no addresses, no loading arguments, no numbers that are none."""
    if isinstance(value, Mapping):
        check_model_arguments(value, where)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_value(part, where)
    elif isinstance(value, str):
        if "://" in value or value.startswith(_ADDRESSES):
            raise InputError(f"{where} is {value!r}, an address; an architecture is built from names and numbers alone")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}, expected a finite number")


def check_of_timm(model: Any, user: str) -> None:
    """Raise an error unless timm built a model, and could build it again; `user` is what needs that, in words.

    Raises:
        InputTypeError: no torch module. InputError: one that timm does not know.
    """
    message = f"{user} needs a model from timm.create_model, got {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{message}; load it with load_model" if isinstance(model, str) else message)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if not timm.is_model(config.get("architecture", "")):
        raise InputError(message)


def model_data_config(model: Any) -> dict[str, Any]:
    """Return timm's data config of a model at the size that it was built for.

    timm's own reads the size from `pretrained_cfg`, which does not know an `img_size` given to `timm.create_model`.
    """
    bare = bare_model(model)
    return resolve_model_data_config(bare, pretrained_cfg=bare.pretrained_cfg | built_size(bare))


def built_size(model: nn.Module) -> dict[str, Any]:
    """Return the entries of `pretrained_cfg` that an `img_size` given to `timm.create_model` changes."""
    size, config = tuple(get_model_input_config(model)["input_size"]), cast(dict[str, Any], model.pretrained_cfg)
    is_known = size[1:] == tuple(config.get("input_size", size))[1:]
    return {} if is_known else {"input_size": size, **NO_TEST_VIEW}
