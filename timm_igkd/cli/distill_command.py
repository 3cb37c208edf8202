"""`timm-igkd distill`: the whole job; its flags are the settings of a run."""

import argparse
import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from timm_igkd.cli.arguments import existing_maps
from timm_igkd.cli.definitions import DISTILL_SUMMARY
from timm_igkd.cli.exit_codes import RUN_INTERRUPTED, run_reporting_errors
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.errors import InputError, UserError
from timm_igkd.files import MARKERS, read_mapping
from timm_igkd.runs.checks import check_checkpoint
from timm_igkd.runs.parsing import OneLineParser, flag_of, parse_config, with_hyphens
from timm_igkd.runs.settings import RunConfig

_DESCRIPTION = f"""{DISTILL_SUMMARY}

  timm-igkd distill                                             the digits demo, two CPU cores, minutes
  timm-igkd distill --dataset FOLDER --teacher resnet50.a1_in1k --teacher-epochs 5 --student resnet18.a1_in1k
  accelerate launch -m timm_igkd distill ...                    several processes, mixed precision

Everything is written under runs/NAME/. A stage whose output is complete is skipped; --resume goes on after a kill.
"""


def distill_command(argv: Sequence[str], prog: str = "timm-igkd distill", description: str = _DESCRIPTION) -> int:
    """Run the job; 2 for bad input, 1 for a run that could not go on, 130 for an interrupted one."""

    def run() -> None:
        keep_freed_memory()
        config = parse_config(RunConfig, argv, prog=prog, description=description)
        _refuse_moved(config, argv)
        if not config.run_dir.exists():  # a run that has begun may need these no more
            check_checkpoint(config, "teacher")
            check_checkpoint(config, "student")
            if config.maps is not None:
                existing_maps(config.maps)
        from accelerate import PartialState

        from timm_igkd.runs.job import distill  # torch and timm, so only once the settings are right

        _note_other_launch(config, argv)
        distill(config)
        PartialState().destroy_process_group()  # not in `distill`: a program may have more to do in its processes

    return run_reporting_errors(run, prog, RUN_INTERRUPTED)


def _run_of_config(argv: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the folder of the run whose own settings --config names, None for others, and what was given beside it."""
    parser = OneLineParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("config", "name", "output_dir"):
        parser.add_argument(flag_of(name), dest=name)
    given = vars(parser.parse_known_args(with_hyphens(argv))[0])
    folder, file = os.path.split(os.path.realpath(given.get("config", "")))
    is_runs = "config" in given and file == "config.yaml" and os.path.isdir(os.path.join(folder, MARKERS))
    return folder if is_runs else None, given


def _note_other_launch(config: RunConfig, argv: Sequence[str]) -> None:
    """Say where a run is repeated by another launch: with other processes or precision it is not the same run."""
    from timm_igkd.training.accelerator import launch_change

    folder, _ = _run_of_config(argv)
    if folder is None or (config.run_dir.exists() and os.path.samefile(config.run_dir, folder)):
        return  # `Stages` knows what goes on otherwise
    with contextlib.suppress(UserError):  # a file that only tells
        earlier = read_mapping(Path(folder) / "environment.json")
        told = os.environ.get  # by the launcher; nothing is begun for a note
        processes, precision = int(told("WORLD_SIZE", "1")), told("ACCELERATE_MIXED_PRECISION", "no")
        change = launch_change(earlier, {"num_processes": processes, "mixed_precision": precision})
        if change is not None and told("RANK", "0") == "0":
            print(
                f"note: the run in {folder!r} was launched with {change}: its settings are repeated, its results are "
                "not (batch_size is per process); for these: accelerate launch --num_processes "
                f"{earlier.get('num_processes', 1)} --mixed_precision {earlier.get('mixed_precision', 'no')} …"
            )


def _refuse_moved(config: RunConfig, argv: Sequence[str]) -> None:
    """Raise InputError where --config is a run's own, and the folder that it names is not, or no more, that run's.

    Whoever goes on with a run that was moved, or from another directory, would train all of it anew somewhere else. A
    name or output_dir on the command line says where to.
    """
    folder, given = _run_of_config(argv)
    if folder is None or given.keys() != {"config"}:
        return
    if config.run_dir.exists() and os.path.samefile(config.run_dir, folder):
        return
    parent, name = os.path.split(folder)
    more = "" if name == config.name else f" --name {shlex.quote(name)}"
    raise InputError(
        f"{given['config']!r} is of the run in {folder!r}, but its settings name {str(config.run_dir)!r}; to go on "
        f"with that run add --output-dir {shlex.quote(parent)}{more}, to repeat it from the start another --name"
    )
