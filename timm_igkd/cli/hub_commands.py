"""The commands of `timm-igkd` that publish: push-maps and push-student."""

import argparse
import sys

from timm_igkd.hub.transport import Pushed
from timm_igkd.maps.push import push_maps
from timm_igkd.report.push import push_student


def push_maps_command(args: argparse.Namespace) -> None:
    """Publish a map store as a dataset on the Hugging Face Hub."""
    pushed = push_maps(
        args.dir,
        args.repo_id,
        args.private,
        overwrite_card=args.overwrite_card,
        replace=args.replace,
        create_pr=args.create_pr,
        timeout_s=args.timeout,
    )
    _report(pushed, f'MapStore("{pushed.name}")')


def push_student_command(args: argparse.Namespace) -> None:
    """Publish a student on the Hugging Face Hub and check that it loads back equal."""
    pushed = push_student(
        args.dir,
        args.repo_id,
        private=args.private,
        overwrite_card=args.overwrite_card,
        replace=args.replace,
        create_pr=args.create_pr,
        maps_repo=args.maps_repo,
        seed_runs=args.seed_runs,
        eval_task=args.eval_task,
        license=args.license,
        timeout_s=args.timeout,
    )
    _report(pushed, f'timm.create_model("hf-hub:{pushed.name}", pretrained=True)')


def _report(pushed: Pushed, usage: str) -> None:
    if pushed.card_kept:
        outdated = ", though it tells of other splits or results than these" if pushed.card_is_outdated else ""
        print(
            f"the card on the Hub was edited by hand and kept{outdated}; --overwrite-card replaces it", file=sys.stderr
        )
    print(f"{pushed}\nload it with: {usage}")
