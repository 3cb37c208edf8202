"""What a model's outputs are called, and whether a dataset's own numbering of its classes is the model's."""

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError


def output_names(model: nn.Module) -> tuple[dict[str, int], bool]:
    """Return the number of each output by its name, and whether the model says the names itself."""
    numbered, known = _numbered_names(model)
    return dict(numbered), known


def _numbered_names(model: nn.Module) -> tuple[list[tuple[str, int]], bool]:
    """Return (name, number) of each output that has a name, see `output_names`; two may have the same."""
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    known = labels is not None
    if labels is None and (subset := infer_imagenet_subset(model)):
        labels = ImageNetInfo(subset).label_names()
    numbered = labels.items() if isinstance(labels, dict) else enumerate(labels or ())
    return [(label, int(i)) for i, label in numbered], known


def own_names(model: nn.Module) -> list[str] | None:
    """Return the name of each output as it is, two may have the same; None where not every output has one."""
    names = {number: name for name, number in _numbered_names(model)[0]}
    is_whole = sorted(names) == list(range(getattr(model, "num_classes", None) or 0))
    found = [names[number] for number in sorted(names)]
    return found if found and is_whole and all(isinstance(name, str) for name in found) else None


def names_in_order(model: nn.Module) -> tuple[list[str] | None, bool]:
    """Return a name for each output, and whether the model says them itself; None where not every output has one.

    Where two have the same, ImageNet's crane and crane, say, each has its number too: "crane (134)".
    """
    names, (_, known) = own_names(model), _numbered_names(model)
    if names is None:
        return None, known
    counts = Counter(names)
    told = [name + f" ({number})" * (counts[name] > 1) for number, name in enumerate(names)]
    return (told if len(set(told)) == len(told) else None), known


def _refuse_shared_names(model: nn.Module, wanted: Iterable[str]) -> None:
    """Raise InputError where one of the wanted classes is the name of two outputs."""
    counts = Counter(name for name, _ in _numbered_names(model)[0])
    twice = next((name for name in wanted if counts[name] > 1), None)
    if twice is not None:
        raise InputError(
            f"the model has {counts[twice]} outputs called {twice!r}, expected one for the dataset's class; give its "
            "label_names a name of its own for each output"
        )


def class_indices(model: nn.Module, class_names: Sequence[str] | None, num_classes: int) -> list[int] | None:
    """Return the model's output for each class of a dataset, or None where they are the same in the same order.

    Args:
        model: its `label_names`, or ImageNet's WordNet ids by its number of outputs, name the outputs.
        class_names: the dataset's class names in label order, None where it has none.
        num_classes: the dataset's number of classes.

    Raises:
        InputError: the dataset's classes are not among the model's, or one of them is the name of two outputs.
    """
    outputs, (names, known) = cast(int, model.num_classes), output_names(model)
    if class_names and all(name in names for name in class_names):
        _refuse_shared_names(model, class_names)
        indices = [names[name] for name in class_names]
        return None if indices == list(range(outputs)) else indices
    if outputs == num_classes and not (known and class_names and not _are_imagenets(model, names)):
        return _by_words(model, class_names) if class_names and names else None
    missing = next((f", {name!r} is not among them" for name in class_names or () if names and name not in names), "")
    raise _other_classes(f"{outputs} classes{missing}", num_classes)


def _other_classes(found: str, num_classes: int) -> InputError:
    return InputError(
        f"the model has {found}, the dataset has {num_classes}; "
        "use a model of the dataset's classes, or one whose label_names contain the dataset's class names, or "
        "fine-tune it on them: timm-igkd distill --teacher-epochs N"
    )


def _by_words(model: nn.Module, class_names: Sequence[str]) -> list[int] | None:
    """Return the output of an ImageNet model for each class of as many, by ImageNet's ids and words; None: in order.

    Raises:
        InputError: most classes, but not all, are ImageNet's, in another order than the outputs.
    """
    numbers = _numbers_of_words(infer_imagenet_subset(model))
    found = [numbers.get(_plain(name)) for name in class_names]
    known = [(own, number) for own, number in enumerate(found) if number is not None]
    if not known:
        _note_order(len(class_names))
    if sum(own == number for own, number in known) >= 0.9 * len(known):  # words are ambiguous for a few
        return None
    if len(known) == len(found) and len(set(found)) == len(found):
        return [number for _, number in known]
    if 2 * len(known) > len(found):
        raise InputError(
            f"{_odd_name(class_names, found, numbers)}, as most of the dataset's {len(found)} classes are; name each "
            "by its WordNet id, such as n01440764, or by all of ImageNet's words for it"
        )
    _note_order(len(class_names), len(known))
    return None


def _odd_name(class_names: Sequence[str], found: Sequence[int | None], numbers: Mapping[str, int | None]) -> str:
    """Return a clause about the first class that is not one of ImageNet's of its own."""
    unknown = [name for name in class_names if _plain(name) not in numbers]
    unsure = [name for name, number in zip(class_names, found, strict=True) if number is None]
    if unknown:
        return f"class {unknown[0]!r} is none of ImageNet's by its id or words"
    if unsure:
        return f"class {unsure[0]!r} is the word of two of ImageNet's classes, and not one by its id or all its words"
    twice = next(number for number in found if found.count(number) > 1)
    both = [name for name, number in zip(class_names, found, strict=True) if number == twice]
    return f"classes {both[0]!r} and {both[1]!r} are one of ImageNet's, and not two by their ids or words"


def _are_imagenets(model: nn.Module, names: Mapping[str, int]) -> bool:
    """Return whether a model's own names are ImageNet's WordNet ids in timm's order, as an exported file has them."""
    subset = infer_imagenet_subset(model)
    return subset is not None and list(names) == ImageNetInfo(subset).label_names()


@functools.cache
def _numbers_of_words(subset: str) -> dict[str, int | None]:
    """Return the output of each WordNet id, description and word of it; None where two share it.

    A whole description goes before a word of another: "cardigan" is the jacket, not the Cardigan Welsh corgi.
    """
    info = ImageNetInfo(subset)
    texts = {number: (name, info.label_name_to_description(name)) for number, name in enumerate(info.label_names())}
    whole, words = dict[str, int | None](), dict[str, int | None]()
    for number, (name, text) in texts.items():
        for table, entries in ((whole, (name, text)), (words, text.split(","))):
            for entry in {_plain(entry) for entry in entries}:
                table[entry] = None if table.get(entry, number) != number else number
    return words | whole


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


@functools.cache
def _note_order(count: int, known: int = 0) -> None:
    some = f"{known} of the dataset's {count} classes have a name of ImageNet's, too few to tell the outputs by"
    none = f"none of the dataset's {count} classes has a name of ImageNet's"
    print(
        f"note: {some if known else none}: they are taken for the model's {count} outputs in their order",
        file=sys.stderr,
    )


def renew_head(model: Any, class_names: Sequence[str] | None, num_classes: int) -> None:
    """Give a model a new head for a dataset's classes, from torch's random state, unless its outputs are these already.

    Args:
        model: a timm model with its own head.
        class_names: as `class_indices` takes them; without names on either side the number decides.
        num_classes: the dataset's number of classes.
    """
    names, known = output_names(model)
    same = not names or not class_names or sorted(names, key=names.__getitem__) == list(class_names)
    if model.num_classes != num_classes or not (same or _are_its_words(model, class_names, names, known)):
        model.reset_classifier(num_classes)
        forget_names(model)


def _are_its_words(model: nn.Module, class_names: Sequence[str] | None, names: Mapping[str, int], known: bool) -> bool:
    """Return whether a data set names ImageNet's classes, all but the ambiguous tenth, in the order of the outputs."""
    subset = infer_imagenet_subset(model)
    if subset is None or not class_names or (known and not _are_imagenets(model, names)):
        return False
    numbers = _numbers_of_words(subset)
    in_place = sum(numbers.get(_plain(name)) == own for own, name in enumerate(class_names))
    return in_place >= 0.9 * len(class_names)


def forget_names(model: Any) -> None:
    """Take off a model what its outputs are called: they are about to be something else."""
    for name in ("label_names", "label_descriptions"):
        model.pretrained_cfg.pop(name, None)


def check_class_map(model: nn.Module, class_map: Mapping[str, int]) -> None:
    """Refuse a class map (`data.items.class_map`) unless its labels are the model's outputs.

    Args:
        model: see `class_indices`.
        class_map: label of each class; classes may share one, and labels may have gaps.

    Raises:
        InputError: a class whose output has another number, or two outputs, or labels that are not as many as the
            outputs.
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
    _refuse_shared_names(model, class_map)
    for name, label in class_map.items():
        if names.get(name) != label:
            found = f"is output {names[name]}" if name in names else "is none of the outputs"
            raise InputError(
                f"the class map gives class {name!r} label {label}, which {found} of the model; give each class the "
                "number of its output, or leave the class map out"
            )


def check_reads_colour(model: nn.Module, role: str) -> None:
    """Raise InputError unless the model reads images of three channels."""
    channels = get_model_input_config(model)["input_size"][0]
    if channels != 3:
        raise InputError(
            f"the {role} must read colour images, 3 channels, got one of {channels}; take one with in_chans=3"
        )
