"""What a model's outputs are called, and whether a dataset's own numbering of its classes is the model's."""

from collections.abc import Mapping
from typing import cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from timm_igkd.errors import InputError


def output_names(model: nn.Module) -> tuple[dict[str, int], bool]:
    """Return the number of each output by its name, and whether the model says the names itself."""
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    known = labels is not None
    if labels is None and (subset := infer_imagenet_subset(model)):
        labels = ImageNetInfo(subset).label_names()
    numbered = labels.items() if isinstance(labels, dict) else enumerate(labels or ())
    return {label: int(i) for i, label in numbered}, known


def check_class_map(model: nn.Module, class_map: Mapping[str, int]) -> None:
    """Refuse a class map (`data.items.class_map`) unless its labels are the model's outputs.

    Args:
        model: see `class_indices`.
        class_map: label of each class; classes may share one, and labels may have gaps.

    Raises:
        InputError: a class whose output has another number, or labels that are not as many as the outputs.
    """
    outputs, (names, known) = cast(int, model.num_classes), output_names(model)
    needed = max(class_map.values()) + 1
    if not known and not any(name in names for name in class_map):
        if needed == outputs:
            return
        raise InputError(
            f"the class map's labels go up to {needed - 1}, expected {outputs - 1} for the {outputs} outputs of the "
            "model; give the classes the numbers of its outputs"
        )
    for name, label in class_map.items():
        if names.get(name) != label:
            found = f"is output {names[name]}" if name in names else "is none of the outputs"
            raise InputError(
                f"the class map gives class {name!r} label {label}, which {found} of the model; give each class the "
                "number of its output, or leave the class map out"
            )
