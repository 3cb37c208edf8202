"""Types, ranges and combinations of a run's settings, checked before anything expensive starts."""

import functools
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from timm_igkd.distillation.options import check_temperature
from timm_igkd.errors import MOST_WORKERS, InputError, MissingFileError, check_count, check_range
from timm_igkd.export.budget import AUTO
from timm_igkd.files import dump_yaml, load_yaml
from timm_igkd.runs.parsing import convert_value, wrong_value
from timm_igkd.runs.protocols import PRESETS, PerProtocol

if TYPE_CHECKING:
    from timm_igkd.runs.settings import RunConfig

CLASS_NAMES = "class names"
"""What a stage reads of them, as its marker calls it; one of before that was written does not tell."""
_type_hints = functools.cache(get_type_hints)
_PLAIN = (bool, int, float, str)  # in this order: a bool is an int
_PLAIN_VALUES = "; give text, numbers, booleans, None, or lists and mappings of these"


def plain_settings(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that were given from Python as config.yaml holds them, so that it reads back to the same.

    A path becomes text, a scalar or array of numpy or torch Python's own; one text for several is the only one, and
    `none` is None, as on the command line. Text is read as nothing else, and nothing is rounded.

    Args:
        cls: dataclass whose fields they are.
        given: by name; PerProtocol is let through.

    Raises:
        InputError: a value that is not of its field's type.
    """
    hints = _type_hints(cls)
    return {
        name: value if isinstance(value, PerProtocol) else _plain_setting(name, value, hints[name])
        for name, value in given.items()
    }


def _plain_setting(name: str, value: Any, annotation: Any) -> Any:
    try:
        plain = _plain(value)
        if isinstance(plain, dict | list) and load_yaml(dump_yaml(plain)) != plain:  # what equals nothing, a nan
            raise ValueError(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong_value(name, value, annotation, _PLAIN_VALUES) from error
    if plain is None and types.NoneType not in get_args(annotation):
        raise wrong_value(name, value, annotation, "; leave it out for the default")
    if isinstance(plain, str) and get_origin(annotation) is tuple:
        plain = [plain]
    found = convert_value(name, plain, annotation)
    if found is not None and plain != (list(found) if isinstance(found, tuple) else found):
        raise wrong_value(name, value, annotation, "; give it without quotes" if isinstance(value, str) else "")
    return found


def _plain(value: Any) -> Any:
    """Return what YAML has for a value, at any depth; TypeError where it has nothing."""
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist") and hasattr(value, "ndim"):  # an array or a scalar; neither numpy nor torch is imported
        return _plain(value.tolist())
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)  # of an enumeration's member the text that it is
    if value is not None:
        raise TypeError(f"config.yaml holds no {type(value).__name__}")
    return None


def check_settings(config: "RunConfig") -> None:
    """Raise InputError for the first setting that is out of its range, or does not go with another."""
    _check_ranges(config)
    config.overlay()
    config.ig_options()
    for trained in ("teacher", "student"):
        config.training(trained)
    config.augmentation()
    if "/" in config.name or config.name in ("", ".", ".."):
        raise InputError(f"name is a folder under output_dir, not a path, got {config.name!r}")
    for trained in ("teacher", "student"):
        if getattr(config, f"{trained}_use_ema") and getattr(config, f"{trained}_checkpoint") is None:
            raise InputError(f"{trained}_use_ema is of a checkpoint; give --{trained}-checkpoint, or drop it")
    _check_teacher(config)
    _check_student(config)
    _check_frozen(config)
    _check_maps(config)
    _check_losses(config)
    _check_compare(config)
    if config.unlabeled is not None:
        check_unlabeled(config)
    elif config.unlabeled_split is not None:
        raise InputError(f"unlabeled_split {config.unlabeled_split} is of no images; give --unlabeled, or drop it")
    if config.batches == "device" and config.only_by_workers is not None:
        raise InputError(f"batches device cannot do {config.only_by_workers}; leave it out, or use batches workers")


def _check_ranges(config: "RunConfig") -> None:
    check_count("batch_size", config.batch_size)
    for name in ("train_limit", "test_limit", "map_size", "img_size", "max_steps_per_epoch"):
        if getattr(config, name) is not None:
            check_count(name, getattr(config, name))
    check_range("seed", config.seed, 0, 2**63 - 1)
    check_count("teacher_epochs", config.teacher_epochs, 0)
    check_count("workers", config.workers, 0, MOST_WORKERS)
    weights = ("distill_loss_weight", "attention_loss_weight", "explanation_loss_weight")
    for name in ("corruptions", *weights, "color_jitter", "mixup", "cutmix"):
        check_range(name, getattr(config, name), 0, sys.float_info.max)
    for name in ("smoothing", "validation_fraction"):
        check_range(name, getattr(config, name), 0, 1)
    check_temperature(config.temperature)


def _check_teacher(config: "RunConfig") -> None:
    if not config.teacher:
        raise InputError(
            f"protocol {config.protocol} needs a teacher, got none; give --teacher NAME, a timm name, hf-hub:… or "
            "local-dir:…, and --teacher-epochs N to fine-tune it on these images"
        )
    is_trained = config.teacher_epochs > 0
    if config.teacher_init == "random":
        if not is_trained:
            raise InputError(
                "teacher_init random with teacher_epochs 0 is a teacher that has learned nothing; set teacher_epochs "
                "above 0, or teacher_init to pretrained"
            )
        if config.teacher_checkpoint is not None:
            raise InputError("teacher_checkpoint holds weights that teacher_init random does not use; drop one of them")
    if config.freeze_teacher_bn and (config.teacher_init == "random" or not is_trained):
        raise InputError(
            "freeze_teacher_bn keeps the statistics of pretrained weights in fine-tuning; set teacher_epochs above 0 "
            "and teacher_init to pretrained, or drop it"
        )


def _check_student(config: "RunConfig") -> None:
    for name in ("max_latency_ms", "max_size_mb"):
        if config.budget() is None and getattr(config, name) is not None:
            raise InputError(f"{name} is for a student that is to be chosen; set student to auto, or drop it")
    for name in ("student_args", "student_checkpoint"):
        if config.student in (None, AUTO) and getattr(config, name):
            raise InputError(f"{name} is for a student given by name; student is {config.student or 'none'}: drop it")
    if config.student is None:
        if config.student_drop < 1:
            raise InputError(f"student_drop must be at least 1 where student is none, got {config.student_drop}")
        return
    assert config.protocol is not None
    if config.student_drop != PRESETS[config.protocol]["student_drop"]:
        raise InputError(
            f"student_drop {config.student_drop} is for a truncated teacher, "
            f"but the student is {config.student}; set student to none, or drop student_drop"
        )
    if config.student_init == "teacher":
        raise InputError(
            "student_init teacher is for a truncated teacher; "
            "set student to none, or student_init to pretrained or random"
        )
    elif config.student_checkpoint is not None and config.student_init == "random":
        raise InputError("student_checkpoint holds weights that student_init random does not use; drop one of them")


def check_checkpoint(config: "RunConfig", name: str) -> None:
    """Raise MissingFileError where the weights of the model `name`, teacher or student, are to come from no file."""
    checkpoint = getattr(config, f"{name}_checkpoint")
    if checkpoint and not Path(os.path.expanduser(checkpoint)).is_file():
        raise MissingFileError(f"no checkpoint file {checkpoint!r} (--{name}-checkpoint)")


def _check_frozen(config: "RunConfig") -> None:
    if config.freeze_student_bn and config.student_init == "random":
        raise InputError(
            "freeze_student_bn keeps the statistics of pretrained weights in training; set student_init to pretrained "
            "or teacher, or drop it"
        )


def _check_maps(config: "RunConfig") -> None:
    if config.engine == "captum" and config.n_steps == "auto":
        raise InputError("n_steps auto needs engine fast; captum takes a whole number")
    if config.engine == "captum" and config.map_method != "ig":
        raise InputError(f"engine captum is the reference of map_method ig alone; take fast for {config.map_method}")
    if config.map_method == "none" and config.reads_maps:
        raise InputError(
            "overlay and explanation loss read maps, map_method none makes none; take another, or set overlay_prob and "
            "explanation_loss_weight to 0"
        )
    if config.maps is None:
        return
    if not config.needs_maps:
        raise InputError(
            "maps are not read where overlay_prob and explanation_loss_weight are 0 and stored_logits false; set "
            "--overlay-prob 0.1, or drop --maps"
        )
    if config.teacher_epochs > 0:
        raise InputError(
            "maps of a teacher that this run trains cannot be there yet; set teacher_epochs to 0 and give the teacher "
            "that they were made with, or drop --maps"
        )


def _check_losses(config: "RunConfig") -> None:
    if config.mixes and config.batch_size % 2:
        raise InputError(f"Mixup and CutMix need an even batch_size, got {config.batch_size}")
    if config.stored_logits and (config.mixes or config.attention_loss_weight > 0):
        raise InputError(
            "stored_logits belong to the clean, uncropped image: with Mixup, CutMix or attention transfer use a "
            "live teacher (stored_logits: false)"
        )
    if config.mixes and config.distill_loss_weight > 0 and config.loss_type == "dkd":
        raise InputError("loss_type dkd needs one class of every image, Mixup and CutMix mix two; use loss_type kl")
    if config.stored_logits and config.distill_loss_weight == 0:
        raise InputError("stored_logits without distillation do nothing; set distill_loss_weight above 0, or drop them")
    if config.explains:
        _check_explanations(config)


def _check_explanations(config: "RunConfig") -> None:
    for name in ("mixup", "cutmix", "aa", "color_jitter", "reprob"):
        if value := getattr(config, name):
            raise InputError(
                f"the explanation loss compares maps of one image, cropped and flipped alone, got {name} {value}; set "
                f"{name} to {'none' if name == 'aa' else 0}, or explanation_loss_weight to 0"
            )
    if config.compile:
        raise InputError(
            "the explanation loss needs second derivatives, which torch.compile has none of; drop --compile, or set "
            "explanation_loss_weight to 0"
        )
    if config.map_target != "label":
        raise InputError(
            f"the explanation loss explains the label, but map_target is {config.map_target}; set map_target to label, "
            "or explanation_loss_weight to 0"
        )


def _check_compare(config: "RunConfig") -> None:
    check_count("seeds", config.seeds, 1)
    if config.compare is None:
        if config.seeds > 1:
            raise InputError(f"seeds {config.seeds} are for the arms of a comparison; add --compare, or drop them")
        return
    if config.seeds == 2:
        raise InputError("an interval over seeds needs 3 of them or more, got seeds 2; set seeds to 3, or to 1")
    if config.distill_loss_weight == config.attention_loss_weight == config.explanation_loss_weight == 0:
        raise InputError(
            "compare asks what the teacher is worth, but distill_loss_weight, attention_loss_weight and "
            "explanation_loss_weight are 0; set one above 0, or compare to none"
        )
    reasons = {
        "overlay_prob is 0": config.overlay_prob == 0,
        "maps are given, so that their cost is not measured": config.maps is not None,
        "the arm with KD alone needs them too, for explanation_loss_weight": config.explains,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if config.compare == "cost" and why is not None:
        raise InputError(f"compare cost spends the maps' time on more epochs, but {why}; use --compare without cost")


def check_unlabeled(config: "RunConfig") -> None:
    """Raise InputError for a setting that does not go with training images without labels."""
    if config.distill_loss_weight == 0:
        raise InputError(
            "images without labels are learnt from by the distillation loss alone, whose weight is 0; set "
            "distill_loss_weight above 0, or drop --unlabeled"
        )
    if config.explains:
        raise InputError(
            "the explanation loss needs the label of every image, some have none here; set explanation_loss_weight to 0"
        )
    if config.mixes:
        raise InputError("Mixup and CutMix mix labels, which images without any lack; set mixup and cutmix to 0")
    if config.loss_type == "dkd":
        raise InputError("loss_type dkd needs the label of every image, some have none here; use loss_type kl")
    if config.reads_maps and config.map_target == "label":
        raise InputError(
            "map_target label needs the label of every image, some have none here; set map_target to predicted, or "
            "overlay_prob to 0"
        )
