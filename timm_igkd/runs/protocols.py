"""Protocols: what a run's settings are where neither a flag nor the YAML file gives them."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from timm_igkd.attribution.ig_options import default_reduction, default_steps
from timm_igkd.errors import InputError, check_choice

Protocol = Literal["demo", "modern", "paper", "fast"]

_MODERN: dict[str, Any] = {
    "validation_split": None,
    "teacher": "",  # to be given
    "teacher_epochs": 0,
    "teacher_init": "pretrained",
    "teacher_lr": 1e-4,
    "student": None,
    "student_drop": 2,
    "student_init": "pretrained",
    "overlay_prob": 0.0,  # it cost 0.49 points of clean accuracy (0.40 to 0.58, n = 24): study_real, recipes/RESULTS.md
    "teacher_view": "same",
    "n_steps": "auto",
    # The best of three on a validation cut of CIFAR-10 (study_real_kd.yaml, n = 1): 91.34 %; 90.62 at 0.5 and 4,
    # 90.00 at 0.01 and 2.5. In earlier studies 0.01 scored 0.03 points over no teacher (cpu_monte_carlo, n = 20).
    "distill_loss_weight": 0.9,
    "temperature": 4.0,
    "stored_logits": False,
    "validation_fraction": 0.1,
    "epochs": 30,
    "batch_size": 64,
    "opt": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": 2,
    "min_lr": 1e-5,
    "train_crop": "rrc",
    "scale_min": 0.35,
    "hflip": 0.5,
    "smoothing": 0.0,
    "workers": min(4, os.cpu_count() or 1),
    "compare": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "demo": _MODERN
    | {
        "validation_split": "validation",
        "teacher": "resnet10t",
        "teacher_epochs": 12,
        "teacher_init": "random",
        "teacher_lr": None,
        "student": "test_resnet",  # of plain timm, 13 times smaller
        "student_init": "random",
        "overlay_prob": 0.1,
        "distill_loss_weight": 0.01,
        "temperature": 2.5,
        "epochs": 20,
        "lr": 2e-3,
        "weight_decay": 0.01,
        "warmup_epochs": 1,
        "train_crop": "pad",
        "scale_min": 0.08,
        "hflip": 0.0,
        "workers": 0,
        "compare": "arms",
    },
    "modern": _MODERN,
    # arXiv 2506.14440, as the protocol `paper` of recipes/studies: no validation images, the last epoch is reported
    "paper": _MODERN
    | {
        "validation_fraction": 0.0,
        "teacher_lr": None,
        "student_drop": 5,
        "student_init": "random",
        "overlay_prob": 0.1,
        "teacher_view": "clean",
        "n_steps": 50,
        "distill_loss_weight": 0.01,
        "temperature": 2.5,
        "stored_logits": True,
        "epochs": 100,
        "opt": "adam",
        "weight_decay": 0.0,
        "sched": "none",
        "warmup_epochs": 0,
        "min_lr": 0.0,
        "train_crop": "pad",
    },
    # after K. Jordan's airbench94, arXiv 2404.00498: the protocol `fast` of recipes/studies but for its borders, flips
    "fast": _MODERN
    | {
        "teacher_lr": None,
        "epochs": 12,
        "batch_size": 256,
        "opt": "sgd",
        "lr": 0.2,
        "weight_decay": 5e-4,
        "sched": "triangular",
        "min_lr": 0.0,
        "train_crop": "pad",
        "smoothing": 0.2,
    },
}
"""Every protocol gives the same settings; a name of a setting that is missing here has one default of its own."""


class PerProtocol:
    """The default of a setting that the run's protocol gives; as text, the value of each."""

    name = ""

    def __set_name__(self, owner: type, name: str) -> None:  # dataclasses hand it on to a field's default
        self.name = name

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

        given = {protocol: text(preset[self.name]) or "to be given" for protocol, preset in PRESETS.items()}
        return ", ".join(f"{protocol} {value}" for protocol, value in given.items())


def resolve_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were not given, or mean another one, by name.

    Args:
        settings: of a run; PerProtocol where a value was not given.
    """
    is_demo = settings["dataset"] == "digits"
    protocol = settings["protocol"] or ("demo" if is_demo else "modern")
    preset = PRESETS[check_choice("protocol", protocol, get_args(Protocol))]
    found = {name: preset[name] for name, value in settings.items() if isinstance(value, PerProtocol)}
    if "student_drop" not in found and "student" in found:
        found["student"] = None  # who says how much to cut wants the truncated teacher, whatever the protocol trains
    wanted = settings | found
    if "min_lr" in found:
        found["min_lr"] = min(found["min_lr"], wanted["lr"])
    if wanted["train_crop"] != "rrc" and wanted["scale_min"] != preset["scale_min"]:
        raise InputError(f"scale_min goes with train_crop rrc alone, got {wanted['train_crop']}; drop it, or set that")
    if "teacher_init" in found and wanted["teacher_epochs"] == 0:
        found["teacher_init"] = "pretrained"  # it is taken as it is
    if wanted["student"] is None and wanted["student_init"] == "pretrained":
        found["student_init"] = "teacher"  # the weights that the kept layers of a truncated teacher have
    if wanted["map_method"] != "ig" and "n_steps" in found:
        found["n_steps"] = default_steps(wanted["map_method"])
    if wanted["map_reduction"] is None:
        found["map_reduction"] = default_reduction(wanted["map_method"])
    dataset = Path(settings["dataset"])
    own = dataset.resolve().name if dataset.name in ("", "..") else dataset.name  # of ".." the folder's that it means
    name = settings["name"] or ("demo" if is_demo else own or "run")
    return found | {"protocol": protocol, "name": name}


def unused_settings(config: Any) -> list[str]:
    """Return a line for each setting that was given and changes nothing, since what it is about is off.

    Args:
        config: a RunConfig.
    """
    overlay = "overlay_prob is 0" if config.overlay_prob == 0 else None
    maps = None if config.reads_maps else "overlay_prob and explanation_loss_weight are 0"
    path = ("n_steps", "max_steps", "tolerance", "map_baseline", "map_target", "map_output", "map_method", "map_size")
    about = {
        ("overlay_weight", "overlay_max_power"): overlay,
        ("overlay_source", "engine", *path): maps,
        ("explanation_map",): None if config.explains else "explanation_loss_weight is 0",
        ("loss_type", "temperature"): "distill_loss_weight is 0" if config.distill_loss_weight == 0 else None,
        ("teacher_lr",): "teacher_epochs is 0" if config.teacher_epochs == 0 else None,
        ("model_ema_decay", "model_ema_warmup"): None if config.model_ema else "model_ema is false",
    }
    defaults = {field.name: field.default for field in fields(config)} | PRESETS[config.protocol]
    if config.map_method != "ig":
        defaults["n_steps"] = default_steps(config.map_method)
    return [
        f"note: {name} {getattr(config, name)} changes nothing, {why}"
        for names, why in about.items()
        for name in names
        if why is not None and getattr(config, name) != defaults[name]
    ]
