"""The command `timm-igkd run`: an unmodified timm training script, its training images overlaid.

`timm.data.create_dataset` is replaced for the script: the dataset it asks for to train on comes wrapped in an
`IGOverlayDataset`, a stream in an `IGOverlayStream`, every other one as timm makes it. A teacher inside the script
(timm's --kd-model-name) sees the student's view, overlay included; the clean view needs the library (README).
"""

import argparse
import functools
import gc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import IterableImageDataset, dataset_factory

from timm_igkd.data.items import dataset_name, read_item, row_name
from timm_igkd.errors import InputError
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.stream import IGOverlayStream
from timm_igkd.overlay.timm_ops import posterize_to_black
from timm_igkd.rounded_bfloat16 import rounded_where_missing
from timm_igkd.with_plugin import run_foreign_script

_HELP = {"-h", "--help", "--version"}
TRAIN_SPLITS = ("train", "training")  # timm's own synonyms


def run_command(args: argparse.Namespace) -> None:
    """Run an unmodified timm training script with its training images overlaid."""
    overlay = IGOverlay(args.overlay_prob, args.overlay_weight, args.overlay_max_power)
    maps = MapStore(args.maps)
    maps.require_maps()
    wrapped: list[IGOverlayDataset | IGOverlayStream] = []

    def wrap(dataset: Any, seed: int) -> Any:
        wrapped.append(overlaid(dataset, maps, overlay, args.overlay_source, seed))
        return wrapped[-1]

    print(
        f"timm-igkd run: overlays {args.overlay_source} maps of {args.maps} (n = {len(maps)}) on a share of "
        f"{overlay.overlay_prob:g} of the training images, of every part that the script splits off them too; tigkd in "
        "its --aa replaces --overlay-prob",
        file=sys.stderr,
    )
    gc.freeze()  # what is imported stays: a forked worker's collections then leave these pages shared
    try:
        with training_datasets(wrap), posterize_to_black(), rounded_where_missing():  # it may have --amp-dtype bfloat16
            run_foreign_script(args.script)
    finally:
        _tell_unreadable(wrapped)
    if not wrapped and not _HELP.intersection(args.script):
        raise InputError(
            f"{args.script[0]!r} ended without asking timm.data.create_dataset for a training dataset, so no image was "
            "overlaid; call it with is_training=True, or use IGOverlayDataset in the script"
        )


def _tell_unreadable(datasets: Sequence[Any]) -> None:
    """Say how many members of tars timm left out."""
    for dataset in datasets:
        if isinstance(dataset, IGOverlayStream) and (count := dataset.images.num_unreadable):
            print(
                f"timm-igkd run: timm left out {count} unreadable {'member' if count == 1 else 'members'} of "
                f"{dataset.name!r}; repair or remove what the lines above name",
                file=sys.stderr,
            )


def overlaid(
    dataset: Any, maps: MapStore, overlay: IGOverlay, source: OverlaySource, seed: int
) -> IGOverlayDataset | IGOverlayStream:
    """Wrap the training dataset of a script; its first, middle and last image, of a stream its first, need maps.

    Raises:
        InputError: maps of other data, or of a part of it.
    """
    transform = getattr(dataset, "transform", None)
    if transform is not None:
        dataset.transform = None
    if isinstance(dataset, IterableImageDataset):
        stream = IGOverlayStream(dataset, maps, overlay, overlay_source=source, seed=seed)
        stream.transform = transform
        stream.check_first_image()
        return stream
    training = IGOverlayDataset(dataset, maps, overlay, overlay_source=source)
    training.transform = transform
    if not len(training):
        raise InputError(f"the training dataset {dataset_name(dataset)!r} has no images, expected at least one")
    for index in sorted({0, len(training) // 2, len(training) - 1}):
        maps.find(*read_item(dataset, index), index, row_name(dataset, index))
    return training


@contextmanager
def training_datasets(wrap: Callable[[Any, int], Any]) -> Iterator[None]:
    """Have `timm.data.create_dataset` pass every training dataset through `wrap`, wherever it was imported to.

    A dataset is for training where the caller says `is_training=True`, or says nothing of it and asks for the split
    "train" or "training".
    """
    original = dataset_factory.create_dataset
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_dataset(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not _for_training(given):
            return original(*args, **kwargs)
        _check_request(given)
        dataset = original(*args, **kwargs)
        if given["name"] and not hasattr(dataset, "name"):
            dataset.name = str(given["name"])  # for messages
        return wrap(dataset, given.get("seed", signature.parameters["seed"].default))

    holders = [module for module in list(sys.modules.values()) if _holds(module, original)]
    for module in holders:
        module.create_dataset = create_dataset  # type: ignore[attr-defined]
    start = torch.multiprocessing.spawn
    torch.multiprocessing.spawn = _refuse_processes
    try:
        yield
    finally:
        torch.multiprocessing.spawn = start
        for module in holders:
            module.create_dataset = original  # type: ignore[attr-defined]


def _refuse_processes(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "the script starts processes of its own (torch.multiprocessing.spawn), whose training images would not be "
        "overlaid; start them by torchrun --no-python --nproc-per-node N timm-igkd run …"
    )


def _holds(module: Any, function: Callable) -> bool:
    return getattr(module, "__dict__", {}).get("create_dataset") is function


def _for_training(given: dict[str, Any]) -> bool:
    if "is_training" in given:
        return bool(given["is_training"])
    return str(given.get("split", "")).split("[")[0] in TRAIN_SPLITS


def _check_request(given: dict[str, Any]) -> None:
    """Refuse what cannot be overlaid before timm opens it."""
    name = str(given.get("name") or "")
    prefix = name.lower().partition("/")[0] if "/" in name else ""
    if prefix == "tfds":
        raise InputError(
            f"dataset {name!r} is decoded by TensorFlow, whose pixels are not those the maps were made from; use wds/, "
            "hfids/, hfds/, torch/ or an image folder"
        )
    if prefix == "wds" and importlib.util.find_spec("webdataset") is None:
        raise InputError(f"dataset {name!r} needs the package webdataset; install it: pip install 'timm-igkd[streams]'")
    mode = given.get("input_img_mode", "RGB")
    if mode != "RGB":
        raise InputError(
            f"overlays need RGB images, the script asks for {mode!r} (input_img_mode); train on 3 channels"
        )
