"""Building a map store: images in, attribution, rows out; any number of processes and machines, killed and resumed."""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.attribution.chunk_pool import one_thread
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.data.items import class_names, dataset_name
from timm_igkd.environment import PACKAGES, environment
from timm_igkd.errors import InputError, check_range
from timm_igkd.files import write_json
from timm_igkd.maps.card import write_store_card
from timm_igkd.maps.kernel_choice import computation
from timm_igkd.maps.row_maker import RowMaker
from timm_igkd.maps.shard_builder import ShardBuilder
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import (
    FORMAT_VERSION,
    check_shard,
    default_shard_rows,
    num_shards,
    open_manifest,
    shard_path,
    statistics,
)
from timm_igkd.models.loading import class_indices, weights_hash

EngineName = Literal["captum", "fast"]


def compute_maps(
    teacher: nn.Module,
    dataset: Any,
    out: str | Path,
    *,
    options: IGOptions | None = None,
    engine: EngineName = "fast",
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    map_size: int | None = None,
    logits: bool = False,
    chunk_size: int | None = None,
    shard_size: int | None = None,
    teacher_name: str | None = None,
    progress: bool = True,
) -> MapStore | None:
    """Compute a teacher's integrated-gradients maps of a dataset and keep them as a store.

    Finished shards are kept: calling again after a kill goes on where it stopped. Under `accelerate launch` or
    `torchrun` the shards are divided among the processes.

    Args:
        teacher: a timm model; its `pretrained_cfg` gives input size, mean and std. A copy in eval mode is used.
        dataset: map-style dataset of (PIL image, label), see data.py.
        out: folder of the store.
        options: which gradients; the default is the paper's.
        engine: "fast", or "captum", the reference.
        limit: only the first images; the store says that it is a prefix.
        shard: (i, n): only every n-th shard, from the i-th; merge by copying the shards of all machines into one
            folder and calling once more without it.
        map_size: side of the stored maps in pixels; default: the teacher's input size.
        logits: store the teacher's logits of each clean image, in the dataset's classes.
        chunk_size: (image, step) pairs per pass; default: from the size of the teacher's activations.
        shard_size: rows per shard; default: at most 256 shards of at least 64 rows.
        teacher_name: for the provenance; default: the architecture.

    Returns:
        The finished store; None while other machines' shards are missing.

    Raises:
        InputError: unusable options, image, label or folder. RunError: maps that are not finite.
    """
    options = options or IGOptions()
    teacher = copy.deepcopy(teacher).eval()
    manifest = _describe(
        teacher, dataset, options, engine, limit, map_size, logits, shard_size, teacher_name, chunk_size
    )
    _check_shard_argument(shard)
    state = PartialState(cpu=not torch.cuda.is_available())
    out = Path(out)
    if state.is_main_process:
        if not (out / "manifest.json").exists():
            manifest |= computation(teacher, dataset, manifest, state.device, chunk_size)
        _check_chunk_size(out, open_manifest(out, manifest), chunk_size)
    state.wait_for_everyone()
    manifest = open_manifest(out, {})
    builder = ShardBuilder(teacher, dataset, out, manifest, state.device)
    mine = range(shard[0], num_shards(manifest), shard[1])[state.process_index :: state.num_processes]
    with one_thread():  # the engine has its own threads; another number here could change last bits
        builder.build(list(mine), progress=progress and state.is_main_process)
    state.wait_for_everyone()
    if any(not shard_path(out, manifest, index).exists() for index in range(num_shards(manifest))):
        return None
    if state.is_main_process:
        finish_store(out, open_manifest(out, {}))
    state.wait_for_everyone()
    return MapStore(out)


def _check_shard_argument(shard: tuple[int, int]) -> None:
    index, count = shard
    if not 0 <= index < count:
        raise InputError(f"shard must be i/n with 0 <= i < n, got {index}/{count}")


def _check_chunk_size(out: Path, found: dict[str, Any], asked: int | None) -> None:
    """Refuse another chunk size than the store was begun with; one that memory halved is kept."""
    if asked is not None and found["chunk_size"] != asked and not found.get("out_of_memory_halvings"):
        raise InputError(
            f"{str(out)!r} holds maps made with other settings: chunk_size is {found['chunk_size']} there, {asked} "
            "here; "
            "choose another --out or delete it"
        )


def _input_shape(teacher: nn.Module) -> tuple[int, ...]:
    """Return what the teacher is fed; a size given when it was built counts before its `pretrained_cfg`'s."""
    return tuple(get_model_input_config(teacher)["input_size"])


def _describe(
    teacher: Any,
    dataset: Any,
    options: IGOptions,
    engine: str,
    limit: int | None,
    map_size: int | None,
    logits: bool,
    shard_size: int | None,
    teacher_name: str | None,
    chunk_size: int | None,
) -> dict[str, Any]:
    """Return the manifest: every setting that changes a number, and what the maps are of."""
    if engine not in ("captum", "fast"):
        raise InputError(f"engine must be 'captum' or 'fast', got {engine!r}")
    if engine == "captum" and options.n_steps == "auto":
        raise InputError("n_steps 'auto' needs engine 'fast'; captum takes a whole number")
    for name, value in (
        ("limit", limit),
        ("map_size", map_size),
        ("shard_size", shard_size),
        ("chunk_size", chunk_size),
    ):
        if value is not None:
            check_range(name, value, 1)
    total = len(dataset)
    if total == 0:
        raise InputError(f"{dataset_name(dataset)!r} has no images, expected at least one")
    n = min(limit or total, total)
    names = class_names(dataset)
    config = teacher.pretrained_cfg
    return {
        "format": FORMAT_VERSION,
        "dataset": {
            "name": dataset_name(dataset),
            "split": str(getattr(dataset, "split", "train")),
            "revision": getattr(dataset, "revision", None),
            "num_images": total,
            "class_names": list(names) if names else None,
        },
        "teacher": {
            "name": teacher_name or config.get("architecture") or type(teacher).__name__,
            "architecture": config.get("architecture"),
            "weights_sha256": weights_hash(teacher),
            **_preprocessing(teacher),
            "class_indices": class_indices(teacher, names, _num_classes(dataset, teacher)),
        },
        "options": options.to_dict(),
        "engine": engine,
        "n": n,
        "map_size": map_size,
        "logits": logits,
        "shard_rows": shard_size or default_shard_rows(n),
        "versions": {name: environment()[name] for name in ("timm_igkd", "python", *PACKAGES)},
    }


def _preprocessing(teacher: Any) -> dict[str, Any]:
    config = teacher.pretrained_cfg
    return {
        "input_size": list(_input_shape(teacher)),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config.get("interpolation"),
    }


def _num_classes(dataset: Any, teacher: Any) -> int:
    names = class_names(dataset)
    return len(names) if names else int(getattr(dataset, "num_classes", teacher.num_classes))


def finish_store(out: Path, manifest: dict[str, Any]) -> None:
    """Check all shards, then write provenance and dataset card, which make the store complete."""
    for left_by_a_kill in out.glob("**/.*.tmp"):
        left_by_a_kill.unlink(missing_ok=True)
    digest, tables = xxhash.xxh3_128(), []
    for shard in range(num_shards(manifest)):
        table = check_shard(shard_path(out, manifest, shard), manifest, shard)
        for key in table.column("key").to_pylist():
            digest.update(key.encode())
        tables.append(table.select(["n_steps", "convergence_delta", "converged", "scale"]))
    provenance = manifest | {"keys_hash": digest.hexdigest(), "statistics": statistics(tables)}
    write_store_card(out, provenance)
    write_json(out / "provenance.json", provenance)


def recompute_rows(store: MapStore, teacher: Any, dataset: Any, count: int) -> tuple[int, float]:
    """Compute `count` evenly spread maps again.

    Returns:
        Largest difference from the stored levels (of 255), and the least correlation of a map with its stored one.

    Raises:
        InputError: more maps than there are, or a teacher that sees images differently from the one that made the maps.
    """
    check_range("recompute", count, 1, len(store))
    for name, made_with in _preprocessing(teacher).items():
        if store.provenance["teacher"][name] != made_with:
            raise InputError(
                f"the maps were made with the teacher's {name} {store.provenance['teacher'][name]}, but this "
                "teacher has "
                f"{made_with}; give the same --teacher-mean, --teacher-std and --teacher-args"
            )
    device = PartialState(cpu=not torch.cuda.is_available()).device
    maker = RowMaker(copy.deepcopy(teacher).eval(), dataset, store.provenance, device)
    indices = np.unique(np.linspace(0, len(store) - 1, count).round().astype(int)).tolist()
    worst, correlation = 0, 1.0
    size = store.provenance["batch_images"]
    for batch in [indices[start : start + size] for start in range(0, len(indices), size)]:
        for index, row in zip(batch, maker.rows(batch, [maker.read(index) for index in batch]), strict=True):
            stored, found = store.levels(index).astype(int), row.map.astype(int)
            worst = max(worst, int(np.abs(stored - found).max()))
            if stored.std() > 0 and found.std() > 0:
                correlation = min(correlation, float(np.corrcoef(stored.ravel(), found.ravel())[0, 1]))
            elif (stored != found).any():  # one of them is constant
                correlation = 0.0
    return worst, correlation
