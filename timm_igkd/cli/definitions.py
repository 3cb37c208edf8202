"""What each command of `timm-igkd` is called with; the modules that do the work are imported when one runs.

Nothing here imports torch, timm or datasets, so that help and wrong arguments are answered at once.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from timm_igkd.attribution.ig_options import Baseline, Dtype, IGOptions, Method, Output, Reduction, Target
from timm_igkd.cli import arguments
from timm_igkd.hub import TIMEOUT_S
from timm_igkd.overlay.blend import IGOverlay, OverlaySource
from timm_igkd.with_plugin import check_script


@dataclass(frozen=True)
class Command:
    """One command of `timm-igkd`.

    Attributes:
        summary: its line in `--help`.
        add_arguments: adds what it is called with to its parser.
        module: in `timm_igkd.cli`, imported when it runs.
        function: of that module, called with the parsed arguments.
        check: raises where the arguments cannot work, before the module is imported.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    function: str
    check: Callable[[argparse.Namespace], None] = lambda args: None


def _maps_arguments(parser: argparse.ArgumentParser) -> None:
    default = IGOptions()
    arguments.add_model_arguments(parser, "teacher")
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--out", required=True, type=arguments.new_folder_argument, help="folder of the store")
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument(
        "--method",
        choices=get_args(Method),
        default=default.method,
        help="default: ig; none: the teacher's logits alone, for distillation without maps",
    )
    parser.add_argument("--engine", choices=("captum", "fast"), default="fast")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of weights and activations")
    parser.add_argument("--compile", action="store_true", help="compile the gradients, for long builds on a GPU")
    # None: not given, so that what the method does not use is refused, its default value too
    path = parser.add_argument_group("path of integrated gradients")
    path.add_argument("--n-steps", type=arguments.steps_argument, metavar="N|auto", help=f"default: {default.n_steps}")
    path.add_argument("--max-steps", type=int, help=f"most steps of an image with auto; default: {default.max_steps}")
    path.add_argument(
        "--tolerance", type=float, help=f"least map correlation with auto; default: {default.tolerance:g}"
    )
    path.add_argument("--baseline", choices=get_args(Baseline), help=f"its start; default: {default.baseline}")
    parser.add_argument("--target", choices=get_args(Target), help=f"default: {default.target}")
    parser.add_argument("--output", choices=get_args(Output), help=f"default: {default.output}")
    parser.add_argument(
        "--reduction", choices=get_args(Reduction), help=f"default: {default.reduction}; positive for grad_cam"
    )
    parser.add_argument(
        "--map-size", type=int, help="side of the stored maps; default, and at most: the teacher's input"
    )
    parser.add_argument(
        "--shard", type=arguments.shard_argument, default=(0, 1), metavar="i/n", help="part for this machine"
    )
    parser.add_argument("--shard-size", type=int, help="rows per shard")
    parser.add_argument("--chunk-size", type=int, help="(image, step) pairs per pass")
    parser.add_argument("--logits", action="store_true", help="store the teacher's logits too")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", required=True, type=arguments.maps_argument, help="folder of a store, or user/name")
    arguments.add_dataset_arguments(parser)
    arguments.add_model_arguments(parser, "teacher", required=False)
    parser.add_argument("--recompute", type=int, metavar="N", help="compute N maps again with --teacher and compare")


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", required=True, type=arguments.maps_argument, help="folder of a store, or user/name")
    arguments.add_model_arguments(parser, "teacher")
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--limit", type=int, help="only so many images, evenly spread; default: all that have a map")
    parser.add_argument("--steps", type=int, default=24, help="equal shares of the pixels; default: 24")
    parser.add_argument("--seed", type=int, default=0, help="of the random maps")
    parser.add_argument(
        "--out",
        required=True,
        type=arguments.file_argument,
        help="file to write; score.json in the store's own folder goes on its card and the run's page",
    )


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", required=True, type=arguments.maps_argument, help="folder of a store, or user/name")
    arguments.add_dataset_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=arguments.file_argument, help="PNG file to write, its name ends in .png"
    )
    parser.add_argument("--count", type=int, default=16, help="images shown, evenly spread")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser, "model")
    arguments.add_model_arguments(parser, "teacher", required=False)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--out", required=True, type=arguments.file_argument, help="metrics.json to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--corruptions",
        nargs="?",
        type=int,
        const=sys.maxsize,
        default=0,
        metavar="N",
        help="measure robustness to 8 kinds of corruption at 5 severities, on N images each; without N on all",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser, "model")
    parser.add_argument("--img-size", type=int, metavar="N", help="input size; default: the model's")
    parser.add_argument(
        "--out", required=True, type=arguments.new_folder_argument, help="folder for the files and export.json"
    )
    parser.add_argument("--int8", action="store_true", help="quantise too, calibrated on --split of --dataset")
    arguments.add_dataset_arguments(parser, required=False)
    parser.add_argument("--calibration", type=int, metavar="N", help="images of --split to calibrate with (256)")
    parser.add_argument("--evaluate-split", metavar="S", help="measure top1 of the files on this split of --dataset")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points of top1 that a file may lose")


def _students_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser, "teacher", weights=False)
    parser.add_argument("--img-size", type=int, metavar="N", help="side of the students' input; default: the teacher's")
    parser.add_argument("--num-classes", type=int, metavar="N", help="of the students; default: the teacher's")
    budget = parser.add_argument_group("budget, at least one of the limits")
    budget.add_argument(
        "--max-latency-ms", type=float, metavar="X", help="of one image in onnxruntime, on one thread of this machine"
    )
    budget.add_argument("--max-size-mb", type=float, metavar="X", help="of the ONNX file, in 10^6 bytes")
    budget.add_argument("--int8", action="store_true", help="measure int8 files too: the faster that fits counts")
    parser.add_argument("--no-cache", action="store_true", help="measure again what this machine has measured before")
    parser.add_argument(
        "--out", type=arguments.new_folder_argument, metavar="DIR", help="folder for students.json and students.svg"
    )


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repo-id", required=True, metavar="USER/NAME", help="repository on the Hub, created if need be"
    )
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a card that was edited by hand on the Hub"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="write over what the repository holds, its card too; other files stay",
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit on main")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="silence of the Hub before a request is made again",
    )


def _push_maps_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", type=arguments.existing_folder_argument, help="of a finished store")
    _push_arguments(parser)


def _push_student_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", metavar="DIR", type=arguments.existing_folder_argument, help="a run folder, or a timm model folder"
    )
    _push_arguments(parser)
    parser.add_argument("--maps-repo", metavar="USER/NAME", help="the teacher's maps on the Hub, linked from the card")
    parser.add_argument(
        "--seed-runs",
        nargs="+",
        type=arguments.existing_folder_argument,
        default=(),
        metavar="DIR",
        help="runs that differ in their seed alone",
    )
    parser.add_argument(
        "--eval-task",
        metavar="TASK_ID",
        help="also file the accuracy under this task of the run's data set, a benchmark on the Hub",
    )
    parser.add_argument("--license", help="identifier of the Hub; default: of the weights it started from")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--maps",
        required=True,
        type=arguments.maps_argument,
        metavar="M",
        help="folder of a finished store, or user/name",
    )
    parser.add_argument(
        "--overlay-prob",
        type=float,
        default=IGOverlay.overlay_prob,
        help=f"share of the training images, default: {IGOverlay.overlay_prob:g}; --aa rand-…-tigkd replaces it",
    )
    parser.add_argument(
        "--overlay-weight",
        type=float,
        default=IGOverlay.overlay_weight,
        help=f"share of the map in the blend, default: {IGOverlay.overlay_weight:g}",
    )
    parser.add_argument(
        "--overlay-max-power",
        type=float,
        default=IGOverlay.max_power,
        help=f"the map's exponent is drawn from 1 to this, default: {IGOverlay.max_power:g}",
    )
    parser.add_argument(
        "--overlay-source",
        choices=get_args(OverlaySource),
        default="aligned",
        help="whose map an image gets, default: aligned; the others are controls",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="-- SCRIPT …", help="script and its arguments")


def _check_run(args: argparse.Namespace) -> None:
    args.script = args.script[1:] if args.script[:1] == ["--"] else args.script
    IGOverlay(args.overlay_prob, args.overlay_weight, args.overlay_max_power)
    check_script(args.script)


DISTILL_SUMMARY = "Distil a teacher into a student: teacher, maps, student, evaluation, report."
"""Of the command whose flags are the settings of a run, see distill_command.py."""

COMMANDS: dict[str, Command] = {
    "maps": Command("Compute a teacher's attribution maps of a dataset.", _maps_arguments, "commands", "maps"),
    "verify": Command(
        "Check that every map belongs to its image and was not altered.", _verify_arguments, "commands", "verify"
    ),
    "score": Command(
        "Measure how faithful maps are: deletion and insertion, beside random, Sobel and centre maps.",
        _score_arguments,
        "commands",
        "score",
    ),
    "preview": Command("Draw images beside their maps and overlays.", _preview_arguments, "commands", "preview"),
    "evaluate": Command(
        "Measure a model on a split: accuracy, calibration, size, latency.",
        _evaluate_arguments,
        "commands",
        "evaluate_command",
    ),
    "export": Command(
        "Export a model to ONNX and int8, and verify the files against PyTorch.",
        _export_arguments,
        "export_command",
        "export_command",
    ),
    "students": Command(
        "List the students that fit a budget of latency or size, measured on this machine.",
        _students_arguments,
        "students_command",
        "students_command",
    ),
    "push-maps": Command(
        "Publish a map store as a dataset on the Hugging Face Hub.",
        _push_maps_arguments,
        "hub_commands",
        "push_maps_command",
    ),
    "push-student": Command(
        "Publish a student on the Hugging Face Hub and check that it loads back equal.",
        _push_student_arguments,
        "hub_commands",
        "push_student_command",
    ),
    "run": Command(
        "Run an unmodified timm training script with its training images overlaid.",
        _run_arguments,
        "run_command",
        "run_command",
        check=_check_run,
    ),
}
