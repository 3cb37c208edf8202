"""What the commands of `timm-igkd` do that build, check and measure; definitions.py says what they are called with."""

import argparse
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from timm_igkd.attribution.ig_options import IGOptions, check_used
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.data.items import refuse_among_images
from timm_igkd.data.loading import Labels, load_labeled_images
from timm_igkd.data.unlabeled import load_unlabeled_images
from timm_igkd.errors import InputError, MissingFileError, check_range, first_line
from timm_igkd.evaluation.evaluated_model import indices_for
from timm_igkd.evaluation.faithfulness import score_maps
from timm_igkd.evaluation.metrics import evaluate, write_metrics
from timm_igkd.evaluation.onnx_model import SUFFIX, load_onnx_model
from timm_igkd.files import MARKERS
from timm_igkd.maps.build import check_teacher, compute_maps, recompute_rows
from timm_igkd.maps.card import write_store_card
from timm_igkd.maps.scores import SCORE
from timm_igkd.maps.store import MapStore
from timm_igkd.models.checkpoint import flag_name
from timm_igkd.models.loading import load_model
from timm_igkd.overlay.preview import check_picture_name, overlay_samples, write_preview
from timm_igkd.progress import progress_bar
from timm_igkd.records import write_record
from timm_igkd.runs.stages import Stages

MOST_NUMBER_DIFFERENCE = 0.05  # of scale and convergence delta computed again, which one pixel can decide
MOST_LOGIT_DIFFERENCE = 1e-3  # from logits computed again; between instruction sets 1e-5 was seen


def model_from(args: argparse.Namespace, role: str, img_size: int | None = None) -> Any:
    """Load the model that the options of `role` name, for images of another side where one is given.

    Raises:
        InputError: besides what `load_model` raises, a number of classes that no weights are there for.
    """
    values = vars(args)
    arguments, checkpoint = dict(values[f"{role}_args"] or ()), values[f"{role}_checkpoint"]
    model: Any = load_model(
        values[role],
        model_args=arguments,
        checkpoint=checkpoint,
        mean=values[f"{role}_mean"],
        std=values[f"{role}_std"],
        use_ema=values[f"{role}_use_ema"],
        img_size=img_size,
        role=role,
    )
    wanted, own = arguments.get("num_classes"), model.pretrained_cfg.get("num_classes")
    if checkpoint is None and wanted not in (None, own):
        raise InputError(
            f"num_classes={wanted} gives {values[role]!r}, which has {own} classes, a classifier of random weights; "
            f"leave it out of {flag_name(role, 'args')}, or give {flag_name(role, 'checkpoint')}"
        )
    return model


def evaluated_model_from(args: argparse.Namespace, role: str) -> Any:
    """Load the model that the options of `role` name, which may be an exported file."""
    values = vars(args)
    if not values[role].endswith(SUFFIX):
        return model_from(args, role)
    for option in ("args", "checkpoint", "mean", "std", "use_ema"):
        if values[f"{role}_{option}"]:
            flag = flag_name(role, option.replace("_", "-"))
            raise InputError(f"{flag} has no effect on an ONNX file, which says its preprocessing itself; leave it out")
    return load_onnx_model(values[role])


def refuse_unused(args: argparse.Namespace, role: str, why: str) -> None:
    """Raise InputError for an option of a model that is not loaded; it would have no effect."""
    for name, value in vars(args).items():
        if name.partition("_")[0] == role and value not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} has no effect {why}")


def dataset_from(args: argparse.Namespace, needs_labels: bool = True) -> Any:
    """Open the dataset that the options name; maps of the predicted class need no labels."""
    if not needs_labels and args.label_column == "none":
        if args.data_dir is not None:
            raise InputError(f"--data-dir {args.data_dir} has no effect beside --label-column none; leave it out")
        return load_unlabeled_images(args.dataset, args.split, args.image_column, args.revision)
    return split_from(args, args.split, "required" if needs_labels else "optional")


def split_from(args: argparse.Namespace, split: str, labels: Labels = "required") -> Any:
    """Open a split of the dataset that the options name."""
    columns = args.image_column, args.label_column, args.revision, args.data_dir
    return load_labeled_images(args.dataset, split, *columns, labels=labels)


def maps(args: argparse.Namespace) -> None:
    """Compute a teacher's attribution maps of a dataset."""
    keep_freed_memory()
    given = {item.name: value for item in fields(IGOptions) if (value := getattr(args, item.name)) is not None}
    check_used(args.method, given)
    options = IGOptions(**given)
    dataset = dataset_from(args, options.needs_labels)
    store = compute_maps(
        model_from(args, "teacher"),
        dataset,
        args.out,
        options=options,
        engine=args.engine,
        dtype=args.dtype,
        compile=args.compile,
        limit=args.limit,
        shard=args.shard,
        map_size=args.map_size,
        logits=args.logits or not options.has_maps,
        chunk_size=args.chunk_size,
        shard_size=args.shard_size,
        teacher_name=args.teacher,
    )
    if store is None:
        print(f"{args.out}: shards {args.shard[0]}/{args.shard[1]} are done; other machines' shards are missing")
        return
    numbers, error = store.provenance.statistics, store.provenance.kernel_error
    unconverged = len(store) - numbers.converged
    path = (
        f", {numbers.mean_steps:.1f} steps on average, |delta| median {numbers.abs_delta_median:.3g} p90 "
        f"{numbers.abs_delta_p90:.3g}"
    )
    print(
        f"{args.out}: {len(store)} "
        + (f"maps{path}" if options.method == "ig" else options.content)
        + (f", {unconverged} images reached --max-steps" if unconverged else "")
        + (f", least correlation with eager float32 {error.correlation:.5f} (n = {error.images})" if error else "")
    )


def verify(args: argparse.Namespace) -> None:
    """Check that every map belongs to its image and was not altered."""
    if args.recompute is None:
        refuse_unused(args, "teacher", "without --recompute N; add it, or leave the teacher out")
    elif args.teacher is None:
        refuse_unused(args, "teacher", "without --teacher; name it too")
    store = MapStore(args.maps)
    if args.recompute is not None:
        check_range("--recompute", args.recompute, 1, len(store))
    dataset = dataset_from(args, store.provenance.options.needs_labels)
    teacher = None if args.recompute is None else _teacher_of(store, args)
    store.verify(dataset, progress=lambda rows: progress_bar(rows, unit="img", desc="verify"))
    n, total = len(store), store.provenance.dataset.num_images
    coverage = f"all {n} rows" if n == total else f"{n} rows, a prefix of {total} images"
    print(f"{args.maps}: keys and hashes of {coverage} match")
    if teacher is None:
        return
    keep_freed_memory()
    found = recompute_rows(store, teacher, dataset, args.recompute)
    if found.levels > 2 and found.correlation < 0.999:
        raise InputError(
            f"{args.recompute} maps computed again differ by up to {found.levels} of 255 levels, least correlation "
            f"{found.correlation:.4f} (2 levels or 0.999 are enough); the store was made with other code or options: "
            "rebuild it"
        )
    if max(found.scale, found.delta) > MOST_NUMBER_DIFFERENCE:
        raise InputError(
            f"{args.recompute} maps computed again have other numbers: scale by {100 * found.scale:.2g} %, convergence "
            f"delta by {found.delta:.2g} ({MOST_NUMBER_DIFFERENCE:g} allowed); the store was made with other code or "
            "changed: rebuild it"
        )
    if found.logits is not None and found.logits > MOST_LOGIT_DIFFERENCE:
        raise InputError(
            f"logits of {args.recompute} images computed again differ by up to {found.logits:.2g} of an image's "
            f"largest ({MOST_LOGIT_DIFFERENCE:g} allowed); the store was made with other code: rebuild it"
        )
    has_maps, told = store.provenance.options.has_maps, []
    if has_maps:
        told.append(f"largest difference {found.levels} of 255, least correlation {found.correlation:.5f}")
        told.append(f"scale within {100 * found.scale:.2g} %")
    if found.logits is not None:
        told.append(f"logits within {found.logits:.2g} of an image's largest")
    print(f"{args.recompute} {'maps' if has_maps else 'rows'} computed again: {', '.join(told)}")


def _teacher_of(store: MapStore, args: argparse.Namespace) -> nn.Module:
    """Return the teacher that made a store: what was given, that of its run, or what goes by the name that it tells."""
    of_run = store.path.absolute().parent / "teacher"  # what a run trained goes by no other name
    is_of_run = (of_run.parent / MARKERS).is_dir() and (of_run / "config.json").exists()
    name = args.teacher or (f"local-dir:{of_run}" if is_of_run else store.provenance.teacher.name)
    try:
        teacher = model_from(args, "teacher") if args.teacher else load_model(name, role="teacher")
    except (InputError, MissingFileError) as error:
        if args.teacher:
            raise
        raise InputError(
            f"the teacher that the store names, {name!r}, is not found from here ({first_line(error)}); name the one "
            "that made it with --teacher"
        ) from error
    check_teacher(store.provenance, teacher, name)
    return teacher


def preview(args: argparse.Namespace) -> None:
    """Draw images beside their maps and overlays."""
    if args.count < 1:
        raise InputError(f"--count must be at least 1, got {args.count}")
    check_picture_name(args.out)
    store = MapStore(args.maps)
    dataset = dataset_from(args, store.provenance.options.needs_labels)
    refuse_among_images(dataset, args.out, "choose another --out")
    write_preview(args.out, overlay_samples(store, dataset, args.count))
    print(args.out)


def score(args: argparse.Namespace) -> None:
    """Measure how faithful maps are: deletion and insertion, beside random, Sobel and centre maps."""
    keep_freed_memory()
    store, teacher = MapStore(args.maps), model_from(args, "teacher")
    dataset = dataset_from(args, store.provenance.options.needs_labels)
    refuse_among_images(dataset, args.out, "choose another --out")
    found = score_maps(store, teacher, dataset, limit=args.limit, steps=args.steps, seed=args.seed)
    write_record(args.out, found)
    if (own := store.path / SCORE).exists() and args.out.samefile(own):  # a link may spell it otherwise
        write_store_card(store.path, store.provenance)
        if Stages.finished(store.path.absolute().parent, "report") is not None:
            print(f"{store.path.parent}: the same `timm-igkd distill` again puts the score on the run's page")
    print(f"{args.out}: {found.n} images; area under deletion (low is faithful) and insertion, mean [95 % interval]")
    for name, deletion, insertion, *gaps in found.rows():
        apart = f"; maps minus these {gaps[0]} and {gaps[1]}" if gaps[0] else ""
        print(f"  {name}: {deletion} and {insertion}{apart}")


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure a model on a split: accuracy, calibration, size, latency."""
    if args.teacher is None:
        refuse_unused(args, "teacher", "without --teacher; name it too")
    dataset = dataset_from(args)
    refuse_among_images(dataset, args.out, "choose another --out")
    model = evaluated_model_from(args, "model")
    teacher = evaluated_model_from(args, "teacher") if args.teacher else None
    result = evaluate(
        model,
        dataset,
        teacher=teacher,
        class_indices=indices_for(model, dataset),
        teacher_class_indices=indices_for(teacher, dataset) if teacher is not None else None,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device="cuda" if torch.cuda.is_available() else "cpu",
        latency_device="cpu",  # the edge's
        corruptions=args.corruptions,
    )
    write_metrics(args.out, result.metrics)
    metrics, robustness = result.metrics, result.metrics.get("robustness")
    corrupted = f", corrupted {robustness['top1']:.2f} % (n = {robustness['n']} each)" if robustness else ""
    print(f"{args.out}: top1 {metrics['top1']:.2f} % of {metrics['n']} images, loss {metrics['loss']:.4f}{corrupted}")
