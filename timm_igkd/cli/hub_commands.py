"""The commands of `timm-igkd` that publish: push-maps and push-student."""

import argparse
import sys

from timm_igkd.cli import arguments
from timm_igkd.hub.transport import TIMEOUT_S, Pushed
from timm_igkd.maps.push import push_maps
from timm_igkd.report.push import push_student


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repo-id", required=True, metavar="USER/NAME", help="repository on the Hub, created if need be"
    )
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a card that was edited by hand on the Hub"
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help="silence before a request is made again"
    )


def push_maps_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of push-maps."""
    parser.add_argument("dir", metavar="DIR", type=arguments.folder_argument, help="folder of a finished store")
    _add_common_arguments(parser)


def push_maps_command(args: argparse.Namespace) -> None:
    """Publish a map store as a dataset on the Hugging Face Hub."""
    _report(
        push_maps(args.dir, args.repo_id, args.private, overwrite_card=args.overwrite_card, timeout_s=args.timeout),
        f'MapStore("{args.repo_id}")',
    )


def push_student_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of push-student."""
    parser.add_argument(
        "dir", metavar="DIR", type=arguments.folder_argument, help="a run folder, or a timm model folder"
    )
    _add_common_arguments(parser)
    parser.add_argument("--maps-repo", metavar="USER/NAME", help="the teacher's maps on the Hub, linked from the card")
    parser.add_argument(
        "--seed-runs", nargs="+", default=(), metavar="DIR", help="runs that differ in their seed alone"
    )
    parser.add_argument("--license", default="apache-2.0", help="identifier of the Hub for the weights' license")


def push_student_command(args: argparse.Namespace) -> None:
    """Publish a student on the Hugging Face Hub and check that it loads back equal."""
    pushed = push_student(
        args.dir,
        args.repo_id,
        private=args.private,
        overwrite_card=args.overwrite_card,
        maps_repo=args.maps_repo,
        seed_runs=args.seed_runs,
        license=args.license,
        timeout_s=args.timeout,
    )
    _report(pushed, f'timm.create_model("hf-hub:{args.repo_id}", pretrained=True)')


def _report(pushed: Pushed, usage: str) -> None:
    if pushed.card_kept:
        print("the card on the Hub was edited by hand and kept; --overwrite-card replaces it", file=sys.stderr)
    print(f"{pushed}\nload it with: {usage}")
