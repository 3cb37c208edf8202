"""The command `timm-igkd export`."""

import argparse

from timm_igkd.cli.commands import model_from, split_from
from timm_igkd.errors import InputError, RunError
from timm_igkd.evaluation.onnx_file import require_onnx_packages
from timm_igkd.export.student import export_student


def export_command(args: argparse.Namespace) -> None:
    """Export a model to ONNX and int8, and verify the files against PyTorch."""
    require_onnx_packages("an export")
    _check_datasets(args)
    calibration, evaluation = (split and split_from(args, split) for split in (args.split, args.evaluate_split))
    record = export_student(
        model_from(args, "model", args.img_size),
        args.out,
        int8=args.int8,
        calibration=calibration,
        **({} if args.calibration is None else {"calibration_images": args.calibration}),
        evaluation=evaluation,
        max_drop=args.max_drop,
        name=args.model,
    )
    print(*record.sentences(args.out), sep="\n")
    failed = [file for file in record.exports if file.passed is False]
    if failed:
        losses = ", ".join(f"{f.format} {f.lost()} ({record.pytorch_top1:.2f} to {f.top1:.2f} %)" for f in failed)
        remedy = "raise --max-drop"
        if all(file.format != "onnx" for file in failed):
            remedy = f"take the float file, or {remedy}"
        raise RunError(
            f"points of top1 lost on {record.verified_on.n} images: {losses}, at most {record.max_drop:g} allowed; "
            f"the files are kept in {str(args.out)!r} with passed: false; {remedy}"
        )


def _check_datasets(args: argparse.Namespace) -> None:
    if args.int8 and not (args.dataset and args.split):
        raise InputError("--int8 needs images to calibrate with; name those of the training with --dataset and --split")
    if args.calibration is not None and not args.int8:
        raise InputError(f"--calibration {args.calibration} has no effect without --int8; add it, or leave it out")
    for flag, value in (("--split", args.split), ("--evaluate-split", args.evaluate_split)):
        if value is not None and not args.dataset:
            raise InputError(f"{flag} {value} is a split of no dataset; name it with --dataset")
    for name in ("revision", "data_dir", "image_column", "label_column"):
        if getattr(args, name) is not None and not args.dataset:
            raise InputError(f"--{name.replace('_', '-')} has no effect without --dataset; name it too")
    if args.dataset and not (args.split or args.evaluate_split):
        raise InputError(f"--dataset {args.dataset} has no effect alone; name a split with --split or --evaluate-split")
