"""What each command of `timm-igkd` does; cli.py parses, reporting.py reports."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, get_args

from tqdm.auto import tqdm

from timm_igkd.attribution.chunk_gradient import Dtype
from timm_igkd.attribution.options import Baseline, IGOptions, Output, Reduction, Target
from timm_igkd.cli import arguments
from timm_igkd.cli.hub_commands import (
    push_maps_arguments,
    push_maps_command,
    push_student_arguments,
    push_student_command,
)
from timm_igkd.cli.run_commands import run_arguments, run_command
from timm_igkd.data.items import class_names, read_item, row_name
from timm_igkd.errors import InputError
from timm_igkd.evaluation.metrics import evaluate, write_metrics
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import class_indices, load_model, weights_hash
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.preview import Sample, write_preview


def _maps_arguments(parser: argparse.ArgumentParser) -> None:
    default = IGOptions()
    arguments.add_model_arguments(parser, "teacher")
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--out", required=True, type=arguments.folder_argument, help="folder of the store")
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--engine", choices=("captum", "fast"), default="fast")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of weights and activations")
    parser.add_argument("--compile", action="store_true", help="compile the gradients, for long builds on a GPU")
    parser.add_argument("--n-steps", type=arguments.steps_argument, default=default.n_steps, metavar="N|auto")
    parser.add_argument("--max-steps", type=int, default=default.max_steps, help="most steps of an image with auto")
    parser.add_argument("--tolerance", type=float, default=default.tolerance, help="least map correlation with auto")
    parser.add_argument("--baseline", choices=get_args(Baseline), default=default.baseline)
    parser.add_argument("--target", choices=get_args(Target), default=default.target)
    parser.add_argument("--output", choices=get_args(Output), default=default.output)
    parser.add_argument("--reduction", choices=get_args(Reduction), default=default.reduction)
    parser.add_argument("--map-size", type=int, help="side of the stored maps; default: the teacher's input size")
    parser.add_argument(
        "--shard", type=arguments.shard_argument, default=(0, 1), metavar="i/n", help="part for this machine"
    )
    parser.add_argument("--shard-size", type=int, help="rows per shard")
    parser.add_argument("--chunk-size", type=int, help="(image, step) pairs per pass")
    parser.add_argument("--logits", action="store_true", help="store the teacher's logits too")


def maps(args: argparse.Namespace) -> None:
    """Compute a teacher's integrated-gradients maps of a dataset."""
    names = ("n_steps", "max_steps", "tolerance", "baseline", "target", "output", "reduction")
    options = IGOptions(**{name: getattr(args, name) for name in names})
    dataset = arguments.dataset_from(args)
    store = compute_maps(
        arguments.model_from(args, "teacher"),
        dataset,
        args.out,
        options=options,
        engine=args.engine,
        dtype=args.dtype,
        compile=args.compile,
        limit=args.limit,
        shard=args.shard,
        map_size=args.map_size,
        logits=args.logits,
        chunk_size=args.chunk_size,
        shard_size=args.shard_size,
        teacher_name=args.teacher,
    )
    if store is None:
        print(f"{args.out}: shards {args.shard[0]}/{args.shard[1]} are done; other machines' shards are missing")
        return
    numbers, error = store.provenance.statistics, store.provenance.kernel_error
    unconverged = len(store) - numbers.converged
    print(
        f"{args.out}: {len(store)} maps, {numbers.mean_steps:.1f} steps on average, |delta| median "
        f"{numbers.abs_delta_median:.3g} p90 {numbers.abs_delta_p90:.3g}"
        + (f", {unconverged} images reached --max-steps" if unconverged else "")
        + (f", least correlation with eager float32 {error.correlation:.5f} (n = {error.images})" if error else "")
    )


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", required=True, help="folder of a store")
    arguments.add_dataset_arguments(parser)
    arguments.add_model_arguments(parser, "teacher", required=False)
    parser.add_argument("--recompute", type=int, metavar="N", help="compute N maps again with --teacher and compare")


def verify(args: argparse.Namespace) -> None:
    """Check that every map belongs to its image and was not altered."""
    store, dataset = MapStore(args.maps), arguments.dataset_from(args)
    store.verify(dataset, progress=lambda rows: tqdm(rows, unit="img", desc="verify", disable=None))
    n, total = len(store), store.provenance.dataset.num_images
    coverage = f"all {n} rows" if n == total else f"{n} rows, a prefix of {total} images"
    print(f"{args.maps}: keys and map hashes of {coverage} match")
    if args.recompute is None:
        return
    made_by = store.provenance.teacher
    teacher = arguments.model_from(args, "teacher") if args.teacher else load_model(made_by.name, role="teacher")
    if weights_hash(teacher) != made_by.weights_sha256:
        raise InputError(f"the maps were made by another teacher than {args.teacher or made_by.name!r}: weights differ")
    worst, correlation = recompute_rows(store, teacher, dataset, args.recompute)
    if worst > 2 and correlation < 0.999:
        raise InputError(
            f"{args.recompute} maps computed again differ by up to {worst} of 255 levels (2 allowed), least "
            "correlation "
            f"{correlation:.4f} (0.999 needed); the store was made with other code or options: rebuild it"
        )
    print(
        f"{args.recompute} maps computed again: largest difference {worst} of 255, least correlation {correlation:.5f}"
    )


def _preview_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", required=True, help="folder of a store")
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--out", required=True, type=arguments.folder_argument, help="PNG file")
    parser.add_argument("--count", type=int, default=16, help="images shown, evenly spread")


def overlay_samples(store: MapStore, dataset: Any, count: int) -> list[Sample]:
    """Return evenly spread images beside their maps and overlays (weight 0.5, exponent 1)."""
    names, samples = class_names(dataset), []
    count = min(count, len(store))
    for position in range(count):
        index = position * len(store) // count
        image, label = read_item(dataset, index)
        levels = store.overlay_map(store.find(image, label, index, row_name(dataset, index)))
        blended = IGOverlay().apply(image, levels, 1.0)
        samples.append(Sample(image, levels, blended, names[label] if names else str(label)))
    return samples


def preview(args: argparse.Namespace) -> None:
    """Draw images beside their maps and overlays."""
    if args.count < 1:
        raise InputError(f"--count must be at least 1, got {args.count}")
    write_preview(args.out, overlay_samples(MapStore(args.maps), arguments.dataset_from(args), args.count))
    print(args.out)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser, "model")
    arguments.add_model_arguments(parser, "teacher", required=False)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--out", required=True, type=arguments.folder_argument, help="metrics.json to write")
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


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure a model on a split: accuracy, calibration, size, latency."""
    dataset = arguments.dataset_from(args)
    model = arguments.model_from(args, "model")
    teacher = arguments.model_from(args, "teacher") if args.teacher else None
    names = class_names(dataset)
    num_classes = getattr(dataset, "num_classes", None) or len(names or ()) or model.num_classes
    result = evaluate(
        model,
        dataset,
        teacher=teacher,
        class_indices=class_indices(model, names, num_classes),
        teacher_class_indices=class_indices(teacher, names, num_classes) if teacher is not None else None,
        batch_size=args.batch_size,
        num_workers=args.workers,
        corruptions=args.corruptions,
    )
    write_metrics(args.out, result.metrics)
    metrics, robustness = result.metrics, result.metrics.get("robustness")
    corrupted = f", corrupted {robustness['top1']:.2f} % (n = {robustness['n']} each)" if robustness else ""
    print(f"{args.out}: top1 {metrics['top1']:.2f} % of {metrics['n']} images, loss {metrics['loss']:.4f}{corrupted}")


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {
    "maps": (_maps_arguments, maps),
    "verify": (_verify_arguments, verify),
    "preview": (_preview_arguments, preview),
    "evaluate": (_evaluate_arguments, evaluate_command),
    "push-maps": (push_maps_arguments, push_maps_command),
    "push-student": (push_student_arguments, push_student_command),
    "run": (run_arguments, run_command),
}
