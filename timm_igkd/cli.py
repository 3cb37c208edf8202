"""The command `timm-igkd`: maps, verify, preview, evaluate, push-maps, push-student, run.

Bad input ends with one line on stderr and exit code 2, a run that could not go on with 1.
"""

import argparse
import errno
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import yaml

from timm_igkd.config import OneLineParser, read_value
from timm_igkd.errors import InputError, RunError, UserError, message_of, nearest

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}


class CommandParser(OneLineParser):
    """A parser of commands, whose options must be written out."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_known_and_check(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; an unknown option is an error that offers the nearest name."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            command = getattr(namespace, "parser", self)
            options = [option for action in command._actions for option in action.option_strings]
            raise InputError(f"{command.prog}: unknown argument {unknown[0]!r}{nearest(unknown[0], options)}")
        return namespace


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
    from timm_igkd.model_loading import load_model

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
    from timm_igkd.data import load_labeled_images

    return load_labeled_images(
        args.dataset, args.split, args.image_column, args.label_column, args.revision, args.data_dir
    )


def build_parser() -> CommandParser:
    """Return the parser of all commands."""
    from timm_igkd import commands
    from timm_igkd.version import __version__

    parser = CommandParser(prog="timm-igkd", description="Knowledge distillation with integrated gradients for timm.")
    parser.add_argument("--version", action="version", version=f"timm-igkd {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for name, (add_arguments, function) in commands.COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        command = subparsers.add_parser(name, help=summary, description=summary)
        add_arguments(command)
        command.set_defaults(function=function, parser=command)
    return parser


def run_reporting_errors(function: Callable[[], None], prog: str) -> int:
    """Run `function`; print what the user can mend as one line and return the exit code."""
    _quiet_libraries()
    try:
        function()
    except UserError as error:
        return _report(prog, message_of(error), error.exit_code)
    except KeyboardInterrupt:
        return _report(prog, "interrupted; the same command again goes on from what is finished", 130)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        return _report(
            prog, f"cannot write{where}: {error.strerror}; free space or choose another folder", RunError.exit_code
        )
    return 0


def _quiet_libraries() -> None:
    """Leave stderr to our one line: no log records of what is raised anyway, no bars where nobody watches."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one warning per retry
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def _report(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for bad input; 1 for a run that could not go on.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)

    def run() -> None:
        args = build_parser().parse_known_and_check(arguments)
        args.function(args)

    return run_reporting_errors(run, "timm-igkd")


def entry() -> None:
    """Console script: quiet libraries, then `main`."""
    warnings.filterwarnings("ignore", module=r"(torch|timm|datasets|accelerate|PIL)\b")
    raise SystemExit(main())


def folder_argument(text: str) -> Path:
    """Parse a path; `~` is the home folder."""
    return Path(text).expanduser()
