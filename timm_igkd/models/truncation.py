"""Students cut from a model's own architecture: the tail goes, the kept weights stay, a new pooled head comes.

The networks for 32x32 images keep their architecture with a larger `drop_blocks`; any other timm model becomes
`igkd_truncated`.
"""

import copy
from typing import Any, cast

import timm
from timm.models import get_model_input_config, get_model_traits
from torch import nn

from timm_igkd.errors import InputError, check_count
from timm_igkd.eval_mode import bare_model, copy_model
from timm_igkd.models.arguments import check_of_timm
from timm_igkd.models.cifar_network import CifarNetwork, check_drop
from timm_igkd.models.output_names import forget_names
from timm_igkd.models.truncated_model import TruncatedModel, below_base, check_cuttable, cut_cfg

CHANGED_MODEL = (
    "the model is not as timm.create_model built it, its weights cannot be copied ({}); truncate it as built"
)


def _copy_kept_weights(model: Any, student: Any) -> None:
    """Copy into `student` all that is left of `model` when it is cut at the same place."""
    source = copy.deepcopy(model)
    source.prune_intermediate_layers([len(student.feature_info) - 1], prune_norm=not isinstance(source, CifarNetwork))
    target = student.base if isinstance(student, TruncatedModel) and not isinstance(model, TruncatedModel) else student
    head = {name for name in student.state_dict() if name.startswith(student.pretrained_cfg["classifier"])}
    try:
        result = target.load_state_dict(source.state_dict(), strict=False)
    except RuntimeError as error:  # a size mismatch
        raise InputError(CHANGED_MODEL.format(str(error).splitlines()[-1].strip()[:200])) from error
    stray = [*result.unexpected_keys, *(key for key in result.missing_keys if key not in head)]
    if stray:
        raise InputError(CHANGED_MODEL.format(f"{stray[0]!r} and {len(stray) - 1} more tensors differ"))


def _construction(model: Any, drop: int, num_classes: int) -> tuple[str, dict[str, Any]]:
    """Return the architecture and arguments of `timm.create_model` for `model` with `drop` entries fewer."""
    current = get_model_input_config(model)
    cfg = cut_cfg({**model.pretrained_cfg, **current}, current["first_conv"])
    arguments: dict[str, Any] = {
        "pretrained_cfg": dict(cfg, num_classes=num_classes),
        "num_classes": num_classes,
        "in_chans": current["input_size"][0],
        "drop_rate": _drop_rate(model),
    }
    if isinstance(model, CifarNetwork):
        name = str(cast(Any, model).pretrained_cfg["architecture"])
        arguments["pretrained_cfg"] = dict(cfg, num_classes=num_classes, architecture=name, classifier="classifier.1")
        arguments |= _pooling(model.global_pool, num_classes) | {"drop_blocks": model.drop_blocks + drop}
        return name, arguments | model.shape_args
    size = get_model_traits(model).get("img_size")
    if size is not None:
        arguments["img_size"] = tuple(size)
    if isinstance(model, TruncatedModel):
        arguments |= _pooling(model.head.global_pool, num_classes)
        return "igkd_truncated", dict(
            arguments, base=model.base_name, base_args=model.base_args, drop=model.drop + drop
        )
    arguments["pretrained_cfg"]["first_conv"] = below_base(current["first_conv"])
    base_args = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in arguments}
    return "igkd_truncated", dict(arguments, base=model.pretrained_cfg["architecture"], base_args=base_args, drop=drop)


def _pooling(layer: Any, num_classes: int) -> dict[str, str]:
    """Return the pooling of a head as an argument; none, as a model without classifier has it, suits no classifier."""
    return {"global_pool": layer.pool_type} if layer.pool_type or not num_classes else {}


def _drop_rate(model: Any) -> float:
    """Return the dropout before a model's classifier, as it was built; some architectures keep no attribute of it."""
    built_with: dict[str, Any] = getattr(model, "_model_args", {})
    return getattr(model, "drop_rate", built_with.get("drop_rate") or 0.0)


def truncate(model: nn.Module, drop: int, num_classes: int | None = None) -> nn.Module:
    """Return a new model without the last `drop` blocks of `model`: kept weights copied, new head.

    The head is initialised from torch's global random state.

    Args:
        model: a model from `timm.create_model`, which may be wrapped (see `bare_model`). The networks for 32x32 images
            count their feature blocks, every other model the entries of `forward_intermediates`; a truncated model can
            be truncated again.
        drop: entries cut from the end; 0 copies the model, its head too where `num_classes` is the same
            (what is frozen stays frozen).
        num_classes: outputs of the new head, the model's own if None.

    Raises:
        InputError: `drop` out of range, or a model that timm did not build or cannot cut.
    """
    model = source = bare_model(model)
    check_of_timm(model, "truncate")
    name = source.pretrained_cfg["architecture"]
    check_cuttable(model, name)
    entries = len(source.feature_info)
    highest = entries - (2 if isinstance(model, CifarNetwork) else 1)
    check_drop("drop", drop, highest, f"{name} has {entries} feature entries")
    outputs = check_count("num_classes", source.num_classes if num_classes is None else num_classes, 0)
    if drop == 0:
        student: Any = copy_model(source)
        if outputs != source.num_classes:
            student.reset_classifier(outputs)
            forget_names(student)
        return student
    architecture, arguments = _construction(model, drop, outputs)
    student = timm.create_model(architecture, **arguments)
    _copy_kept_weights(model, student)
    parameter = next(model.parameters())
    return student.to(device=parameter.device, dtype=parameter.dtype).train(model.training)
