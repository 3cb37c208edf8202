"""Building a map store: images in, attribution, rows out; any number of processes and machines, killed and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from timm_igkd.attribution.chunk_gradient import Arithmetic
from timm_igkd.attribution.chunk_pool import one_thread
from timm_igkd.attribution.chunk_size import activation_chunk, images_per_batch
from timm_igkd.attribution.grad_cam import check_method
from timm_igkd.attribution.ig_options import Dtype, IGOptions
from timm_igkd.attribution.options import TeacherView
from timm_igkd.attribution.teacher_copy import answer_to_noise, answers_alike, teacher_copy
from timm_igkd.data.items import (
    class_map,
    class_names,
    refuse_among_images,
    refuse_overlaid,
)
from timm_igkd.data.labels import evenly_spread
from timm_igkd.environment import LONGEST_WAIT, PACKAGES, environment
from timm_igkd.errors import InputError, check_count, check_images, check_kind, check_range
from timm_igkd.eval_mode import bare_model
from timm_igkd.files import given_path, remove_abandoned
from timm_igkd.maps.card import write_store_card
from timm_igkd.maps.manifest import EngineName, Manifest, Provenance, SourceDataset, SourceTeacher, read_manifest
from timm_igkd.maps.row_format import statistics
from timm_igkd.maps.row_maker import (
    Recomputed,
    RowMaker,
    compare_rows,
    measure_deviation,
    preprocessing,
    source_dataset,
    view_difference,
)
from timm_igkd.maps.shard_builder import ShardBuilder, checked_shard
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import (
    check_shard,
    count_shards,
    default_shard_rows,
    keys_hash,
    open_manifest,
    shard_paths,
)
from timm_igkd.models.loading import weights_hash
from timm_igkd.models.output_names import check_class_map, class_indices, output_names
from timm_igkd.records import write_record

COMPARED_IMAGES = 8


def compute_maps(
    teacher: nn.Module,
    dataset: Any,
    out: str | Path,
    *,
    options: IGOptions | None = None,
    engine: EngineName = "fast",
    dtype: Dtype = "float32",
    compile: bool = False,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    map_size: int | None = None,
    logits: bool = False,
    chunk_size: int | None = None,
    shard_size: int | None = None,
    teacher_name: str | None = None,
    progress: bool = True,
) -> MapStore | None:
    """Compute a teacher's attribution maps of a dataset, integrated gradients by default, and keep them as a store.

    Finished shards are kept: calling again after a kill goes on where it stopped. Under `accelerate launch` or
    `torchrun` the shards are divided among the processes. Two calls that build one folder at once, with the same
    settings, both succeed: each computes the shards that it did not find and renames them into place.

    Args:
        teacher: a timm model, or any with timm's `pretrained_cfg` for input size, mean and std; see `teacher_copy`.
        dataset: map-style dataset of (PIL image, label), see data/items.py.
        out: folder of the store.
        options: which attribution; the default is the paper's.
        engine: "fast", or "captum", the reference for integrated gradients.
        dtype: of the teacher's weights and activations; sums are float32. What bfloat16 changes is measured on some
            images and stands in the manifest.
        compile: compile the gradients with torch.compile, which pays in long builds on a GPU; measured likewise.
        limit: only the first images; the store says that it is a prefix.
        shard: (i, n): only every n-th shard, from the i-th; merge by copying the shards of all machines into one
            folder and calling once more without it.
        map_size: side of the stored maps in pixels; default: the teacher's input size.
        logits: store the teacher's logits of each clean image, in the dataset's classes; with method "none" of the
            options they are all that is computed and kept.
        chunk_size: (image, step) pairs per pass; default: from the size of the teacher's activations.
        shard_size: rows per shard; default: at most 256 shards of at least 64 rows.
        teacher_name: for the provenance; default: the architecture.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The finished store; None while other machines' shards are missing.

    Raises:
        InputError: unusable options, image, label or folder, or processes whose teachers differ.
        RunError: maps that are not finite, or no compiler.
    """
    shard = checked_shard(shard)
    sizes = {"limit": limit, "map_size": map_size, "shard_size": shard_size, "chunk_size": chunk_size}
    limit, map_size, shard_size, chunk_size = (n if n is None else check_count(name, n) for name, n in sizes.items())
    _check_kinds(dataset, options, teacher_name, {"logits": logits, "compile": compile})
    out = given_path("out", out)
    given, teacher = teacher, teacher_copy(teacher)
    refuse_among_images(dataset, out, "choose another --out")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    source, shape = source_dataset(dataset, limit), TeacherView(teacher).shape
    options = options or IGOptions()
    n = min(limit or source.num_images, source.num_images)
    wanted = Manifest(
        dataset=source,
        teacher=source_teacher(teacher, dataset, teacher_name, given),
        options=options,
        engine=engine,
        dtype=dtype,
        compiled=compile,
        n=n,
        map_size=map_size,
        logits=logits,
        shard_rows=shard_size or default_shard_rows(n),
        versions=package_versions(),
        chunk_size=chunk_size or activation_chunk(teacher, shape, state.device, options.method == "ig"),
        batch_images=images_per_batch(shape, state.device),
    )
    check_method(teacher, wanted.options, shape)
    _check_processes_agree(wanted.teacher)
    if state.is_main_process:
        _begin_store(teacher, dataset, out, wanted, chunk_size, state.device)
    state.wait_for_everyone()
    manifest = read_manifest(out)
    finished = manifest.dataset.content_hash if (out / "provenance.json").exists() else None
    builder = ShardBuilder(teacher, dataset, out, manifest, state.device, source.content_hash, finished)
    mine = range(shard[0], manifest.num_shards, shard[1])[state.process_index :: state.num_processes]
    with one_thread():  # the engine has its own threads; another number here could change last bits
        builder.build(list(mine), progress=progress and state.is_main_process)
    state.wait_for_everyone()
    (found_shards,) = broadcast_object_list([count_shards(out, manifest)])  # other calls add shards meanwhile
    if found_shards < manifest.num_shards:
        return None
    others = [other for other in range(manifest.num_shards) if other % shard[1] != shard[0]]
    builder.check_images([*mine, *others[state.process_index :: state.num_processes]])
    state.wait_for_everyone()
    if state.is_main_process:
        _finish_build(out, source, builder)
    state.wait_for_everyone()
    return MapStore(out)


def _check_processes_agree(teacher: SourceTeacher) -> None:
    """Raise InputError in every process where one has a teacher of other weights: each makes rows of one store."""
    hashes = gather_object([teacher.weights_sha256])
    if different := [process for process, found in enumerate(hashes) if found != hashes[0]]:
        raise InputError(
            f"the teacher of process {different[0]} has other weights than that of process 0; load the same in all "
            "(after a training, average the statistics of its batch norms: timm.utils.distribute_bn)"
        )


def _check_kinds(dataset: Any, options: Any, teacher_name: Any, switches: dict[str, Any]) -> None:
    check_images("dataset", dataset)
    refuse_overlaid(dataset)
    if options is not None:
        check_kind("options", options, IGOptions, "IGOptions", "give timm_igkd.IGOptions(…)")
    check_kind("teacher_name", teacher_name, str | None, "a name", "give a text")
    for name, value in switches.items():
        check_kind(name, value, bool, "True or False", "give one of them")


def _finish_build(out: Path, source: SourceDataset, builder: ShardBuilder) -> None:
    """Complete a store whose shards are all there."""
    found = read_manifest(out)
    # images may have been repaired since the build began; the name may be another path to the same
    manifest = replace(found, dataset=replace(source, name=found.dataset.name, split=found.dataset.split))
    if manifest != found:
        write_record(out / "manifest.json", manifest)
    finish_store(out, manifest)
    builder.statements.remove(shard_paths(out, manifest))


def _begin_store(
    teacher: nn.Module, dataset: Any, out: Path, wanted: Manifest, chunk_size: int | None, device: torch.device
) -> None:
    """Write the manifest of a new store, or refuse a folder whose store was begun with other settings.

    A chunk size that was not asked for, or that memory halved, is kept as it is there.
    """
    if wanted.arithmetic != Arithmetic() and not (out / "manifest.json").exists():
        indices = evenly_spread(wanted.n, COMPARED_IMAGES)
        wanted = replace(wanted, kernel_error=measure_deviation(teacher, dataset, wanted, device, indices))
    found = open_manifest(out, wanted)
    if chunk_size is not None and found.chunk_size != chunk_size and not found.out_of_memory_halvings:
        raise InputError(
            f"{str(out)!r} holds maps made with other settings: chunk_size is {found.chunk_size} there, {chunk_size} "
            "here; choose another --out or delete it"
        )


def source_teacher(teacher: Any, dataset: Any, name: str | None, given: nn.Module | None = None) -> SourceTeacher:
    """Return what a store says of the teacher whose maps of a dataset it holds.

    Args:
        teacher: the model, or its `teacher_copy`.
        dataset: whose maps.
        name: what the teacher was asked for by; default: its architecture.
        given: the model that `teacher` is a `teacher_copy` of; its weights are hashed as they are.
    """
    config = teacher.pretrained_cfg
    return SourceTeacher(
        name=name or config.get("architecture") or type(teacher).__name__,
        architecture=config.get("architecture"),
        weights_sha256=weights_hash(bare_model(given or teacher)),
        **preprocessing(teacher),
        num_classes=teacher.num_classes,
        class_indices=teacher_outputs(teacher, dataset),
        answer=answer_to_noise(teacher_copy(teacher) if given is None else teacher),
    )


def teacher_outputs(teacher: Any, dataset: Any) -> tuple[int, ...] | None:
    """Return a teacher's output of each of a dataset's classes; None where they are its outputs in order."""
    names = class_names(dataset)
    num_classes = len(names) if names else int(getattr(dataset, "num_classes", None) or teacher.num_classes)
    if not names and not output_names(teacher)[0]:  # labels are outputs, of which images may lack the last ones
        num_classes = max(num_classes, teacher.num_classes)
    if (labels := class_map(dataset)) is not None:
        check_class_map(teacher, labels)
        num_classes = teacher.num_classes
    indices = class_indices(teacher, names, num_classes)
    return None if indices is None else tuple(indices)


def package_versions() -> dict[str, str | None]:
    """Return the versions that a store names."""
    found = environment()
    return {name: found[name] for name in ("timm_igkd", "python", *PACKAGES)}  # type: ignore[misc]


def finish_store(out: Path, manifest: Manifest) -> None:
    """Check all shards, then write provenance and dataset card, which make the store complete."""
    remove_abandoned(out)
    columns = ["key", "n_steps", "convergence_delta", "converged", "scale"]
    tables = [
        check_shard(path, manifest, shard).select(columns) for shard, path in enumerate(shard_paths(out, manifest))
    ]
    keys = (key for table in tables for key in table.column("key").to_pylist())
    provenance = Provenance(**vars(manifest), keys_hash=keys_hash(keys), statistics=statistics(tables))
    write_store_card(out, provenance)
    write_record(out / "provenance.json", provenance)


def check_teacher(provenance: Provenance, teacher: Any, name: str | None = None) -> None:
    """Raise InputError unless a teacher, called `name`, is the one that made the maps, see `teacher_difference`."""
    if (difference := teacher_difference(provenance, teacher)) is not None:
        given = "the one given" if name is None else repr(name)
        raise InputError(f"the maps were made by another teacher than {given}: {difference}")


def teacher_difference(provenance: Provenance, teacher: Any, dataset: Any = None) -> str | None:
    """Return in what a teacher is not the one that made maps, and what to do, in words; None where it is.

    Args:
        provenance: of the maps.
        teacher: the same has their weights, sees images as theirs did and answers alike.
        dataset: whose classes are to be the outputs that the maps were made for; None: they are not compared.
    """
    made = provenance.teacher
    if weights_hash(bare_model(teacher)) != made.weights_sha256:
        return "weights differ; give the teacher that they were made with"
    if (difference := view_difference(made, teacher)) is not None:
        return difference
    if dataset is not None and teacher_outputs(teacher, dataset) != made.class_indices:
        return "it had other outputs for these images' classes; give the images that they were made of"
    if not answers_alike(made.answer, answer_to_noise(teacher_copy(teacher))):
        return "one of these weights with other arguments: it answers otherwise; give the same --teacher-args"
    return None


def recompute_rows(store: MapStore, teacher: Any, dataset: Any, count: int) -> Recomputed:
    """Compute `count` evenly spread rows again, and return how near they are to the stored ones.

    Raises:
        InputError: more rows than there are, or a teacher that sees images differently from the one that made the maps.
    """
    check_range("recompute", count, 1, len(store))
    teacher = teacher_copy(teacher)
    if (difference := view_difference(store.provenance.teacher, teacher)) is not None:
        raise InputError(f"the maps were made by a teacher that saw images otherwise: {difference}")
    maker = RowMaker(teacher, dataset, store.provenance, PartialState(cpu=not torch.cuda.is_available()).device)
    return compare_rows(store, maker, evenly_spread(len(store), count))
