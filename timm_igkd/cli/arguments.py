"""Arguments that several commands share: a model, a dataset, a folder; and what they open."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from timm_igkd.data.loading import load_labeled_images
from timm_igkd.models.loading import load_model
from timm_igkd.runs.parsing import read_value


def key_value(text: str) -> tuple[str, Any]:
    """Parse `key=value`, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, read_value(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is not YAML") from error


def shard_argument(text: str) -> tuple[int, int]:
    """Parse `i/n`."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected i/n, for example 0/4, got {text!r}") from error
    return index, count


def steps_argument(text: str) -> int | str:
    """Parse a number of steps or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number or 'auto', got {text!r}") from error


def add_model_arguments(parser: argparse.ArgumentParser, role: str, required: bool = True) -> None:
    """Add the options that name a model; `role` "teacher" prefixes them, "model" (of evaluate) does not."""
    prefix = "--teacher-" if role == "teacher" else "--"
    args_flag = "--teacher-args" if role == "teacher" else "--model-args"
    group = parser.add_argument_group(role)
    group.add_argument(f"--{role}", required=required, help="timm name, hf-hub:user/name or local-dir:folder")
    group.add_argument(args_flag, dest=f"{role}_args", nargs="+", type=key_value, metavar="k=v", help="model arguments")
    group.add_argument(f"{prefix}checkpoint", dest=f"{role}_checkpoint", help=".safetensors or timm .pth.tar")
    group.add_argument(f"{prefix}mean", dest=f"{role}_mean", nargs=3, type=float, metavar=("R", "G", "B"))
    group.add_argument(f"{prefix}std", dest=f"{role}_std", nargs=3, type=float, metavar=("R", "G", "B"))
    group.add_argument(
        f"{prefix}use-ema", dest=f"{role}_use_ema", action="store_true", help="EMA weights of a .pth.tar"
    )


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a dataset."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset", required=True, help="Hub id, folder of parquet or of class folders, or digits")
    group.add_argument("--split", required=True)
    group.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    group.add_argument("--data-dir", help="root of a timm dataset (torch/…, hfds/…, folder/)")
    group.add_argument("--image-column")
    group.add_argument("--label-column")


def model_from(args: argparse.Namespace, role: str) -> Any:
    """Load the model that the options of `role` name."""
    values = vars(args)
    return load_model(
        values[role],
        model_args=dict(values[f"{role}_args"] or ()),
        checkpoint=values[f"{role}_checkpoint"],
        mean=values[f"{role}_mean"],
        std=values[f"{role}_std"],
        use_ema=values[f"{role}_use_ema"],
        role=role,
    )


def dataset_from(args: argparse.Namespace) -> Any:
    """Open the dataset that the options name."""
    return load_labeled_images(
        args.dataset, args.split, args.image_column, args.label_column, args.revision, args.data_dir
    )


def folder_argument(text: str) -> Path:
    """Parse a path; `~` is the home folder."""
    return Path(text).expanduser()
