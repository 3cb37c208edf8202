"""Arguments that several commands share: a model, a dataset, a folder."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.files import output_file
from timm_igkd.runs.parsing import read_value


def key_value(text: str) -> tuple[str, Any]:
    """Parse `key=value`, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, read_value(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is not YAML") from error


class PairsAction(argparse.Action):
    """Collect `key=value` pairs, also of an option that is repeated; a key given twice is an error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add the pairs of one occurrence."""
        pairs = [*(getattr(namespace, self.dest) or ()), *values]
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise argparse.ArgumentError(self, f"{twice[0]!r} is given twice; leave one out")
        setattr(namespace, self.dest, pairs)


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


def add_model_arguments(
    parser: argparse.ArgumentParser, role: str, required: bool = True, weights: bool = True
) -> None:
    """Add the options that name a model; `role` "teacher" prefixes them, "model" (of evaluate) does not.

    Without `weights` they are those of its architecture alone.
    """
    prefix = "--teacher-" if role == "teacher" else "--"
    args_flag = "--teacher-args" if role == "teacher" else "--model-args"
    group = parser.add_argument_group(role)
    group.add_argument(
        f"--{role}", required=required, type=name_argument, help="timm name, hf-hub:user/name or local-dir:folder"
    )
    pairs: dict[str, Any] = {"action": PairsAction, "nargs": "+", "type": key_value, "metavar": "k=v"}
    group.add_argument(args_flag, dest=f"{role}_args", help="model arguments", **pairs)
    if not weights:
        return
    group.add_argument(
        f"{prefix}checkpoint", dest=f"{role}_checkpoint", type=checkpoint_argument, help=".safetensors or timm .pth.tar"
    )
    group.add_argument(f"{prefix}mean", dest=f"{role}_mean", nargs=3, type=float, metavar=("R", "G", "B"))
    group.add_argument(f"{prefix}std", dest=f"{role}_std", nargs=3, type=float, metavar=("R", "G", "B"))
    group.add_argument(
        f"{prefix}use-ema", dest=f"{role}_use_ema", action="store_true", help="EMA weights of a .pth.tar"
    )


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options that name a dataset."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset",
        required=required,
        type=name_argument,
        help="Hub id, folder of parquet, of class folders or of webdataset tars, or digits",
    )
    group.add_argument("--split", required=required)
    group.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    group.add_argument("--data-dir", type=name_argument, help="root of a timm dataset (torch/…, hfds/…, folder/)")
    group.add_argument("--image-column")
    group.add_argument(
        "--label-column", help="none: images without labels, for maps of --target predicted, or --method none"
    )


def name_argument(text: str) -> str:
    """Parse a name that can be a path, such as a dataset's; refuse what no file system takes."""
    try:
        text.encode()
        os.stat(text)
    except (FileNotFoundError, PermissionError) as error:
        if not text:
            raise argparse.ArgumentTypeError("expected a name or a path, got an empty text") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL, or bytes that are no text
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise argparse.ArgumentTypeError(f"cannot use {shown!r}: {reason}") from error
    return text


def folder_argument(text: str) -> Path:
    """Parse a path; `~` is the home folder."""
    return Path(os.path.expanduser(name_argument(text)))


def file_argument(text: str) -> Path:
    """Parse the path of a file to write; its folder, or the nearest that is there, must take a file before any work."""
    _check_takes(text, folder_argument(text))
    return folder_argument(text)


def new_folder_argument(text: str) -> Path:
    """Parse the path of a folder to write, there or not; it, or the nearest that is there, must take a file."""
    path = folder_argument(text)
    _check_takes(text, path / "file")
    return path


def _check_takes(text: str, path: Path) -> None:
    """Refuse what no file can be written to; `text` is what the user gave."""
    try:
        parents = output_file(path).absolute().parents
        with tempfile.TemporaryFile(dir=next(parent for parent in parents if parent.exists())):
            pass
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}; give another folder") from error


def existing_folder_argument(text: str) -> Path:
    """Parse a folder, which must be there."""
    path = folder_argument(text)
    if not path.is_dir():
        raise MissingFileError(f"no folder {str(path)!r}; give that of a finished store, run or timm model")
    return path


def maps_argument(text: str) -> str:
    """Parse a folder of maps, or user/name of the Hub; what can be neither is refused before anything is imported."""
    return existing_maps(name_argument(text))


def existing_maps(folder: str) -> str:
    """Return the name of a store; MissingFileError where it is no folder, and cannot be a name of the Hub either."""
    folder = os.path.expanduser(folder)
    if not os.path.exists(folder) and (folder.partition("@")[0].count("/") != 1 or folder.startswith((".", "/", "~"))):
        raise MissingFileError(f"map store {folder!r} does not exist; build it with: timm-igkd maps --out {folder}")
    return folder


def checkpoint_argument(text: str) -> Path:
    """Parse a file of weights, which must be there."""
    path = folder_argument(text)
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file {str(path)!r}; give the path of a .safetensors or .pth.tar file")
    return path
