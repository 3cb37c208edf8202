"""The commands of `timm-igkd` that publish: push-maps and push-student."""

import argparse
import sys

from timm_igkd.hub.transport import Pushed
from timm_igkd.maps.push import push_maps
from timm_igkd.report.push import push_student


def push_maps_command(args: argparse.Namespace) -> None:
    """Publish a map store as a dataset on the Hugging Face Hub."""
    _report(
        push_maps(args.dir, args.repo_id, args.private, overwrite_card=args.overwrite_card, timeout_s=args.timeout),
        f'MapStore("{args.repo_id}")',
    )


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
