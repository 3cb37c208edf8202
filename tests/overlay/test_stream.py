"""The overlay in timm's streaming datasets: maps found by content, draws owned by (seed, epoch, key, occurrence)."""

import itertools
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from tiny_parts import ImageList, noise_image, png, ramp, write_store, write_tar
from torch.utils.data import DataLoader

from timm_igkd import IGOverlay, IGOverlayStream, MapStore
from timm_igkd.data.images import content_key
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.overlay.dataset import IGOverlayDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves the tars it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]
N, SHARDS = 12, 4
EXACT = IGOverlay(overlay_prob=1, max_power=1)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return ImageList([noise_image(seed) for seed in range(N)], [seed % 2 for seed in range(N)], name="folder")


@pytest.fixture(scope="module")
def store(images, tmp_path_factory) -> MapStore:
    return write_store(tmp_path_factory.mktemp("maps"), images, [ramp(index, 16, 16) for index in range(N)])


@pytest.fixture(scope="module")
def tars(images, tmp_path_factory) -> Path:
    root, per_shard = tmp_path_factory.mktemp("tars"), N // SHARDS
    for shard in range(SHARDS):
        rows = range(shard * per_shard, (shard + 1) * per_shard)
        members = [(png(images[row][0]), str(images[row][1])) for row in rows]
        write_tar(root / f"train-{shard}.tar", members, rows[0])
    return root


def timm_stream(tars: Path, **options: Any) -> Any:
    split = f"train-{{0..{SHARDS - 1}}}.tar|{N}"
    return create_dataset("wds/", root=str(tars), split=split, is_training=True, **{"batch_size": 1} | options)


def stream_of(tars: Path, store: MapStore | None, overlay: IGOverlay | None = EXACT, **options: Any) -> IGOverlayStream:
    return IGOverlayStream(timm_stream(tars), store, overlay, **options)


@pytest.mark.parametrize("persistent", [False, True])
def test_no_pass_of_workers_repeats_another_where_nobody_tells_the_epoch(tars, store, persistent):
    stream = stream_of(tars, store, IGOverlay(overlay_prob=0.5))
    stream.transform = create_transform(16, is_training=True, scale=(0.2, 0.6))
    torch.manual_seed(0)
    loader = create_loader(
        stream, 16, 1, is_training=True, num_workers=1, persistent_workers=persistent, use_prefetcher=False,
        scale=(0.2, 0.6),
    )  # fmt: skip
    views = [image.numpy().tobytes() for _ in range(3) for image, _ in loader]
    assert len(set(views)) == len(views) == 3 * N


def test_an_epoch_that_is_told_is_the_same_in_workers_of_every_pass(tars, store):
    stream = stream_of(tars, store, IGOverlay(overlay_prob=0.5))
    loader = create_loader(
        stream, 16, 1, is_training=True, num_workers=1, persistent_workers=False, use_prefetcher=False, scale=(0.2, 0.6)
    )
    passes = []
    for _ in range(2):
        stream.set_epoch(3)
        passes.append({image.numpy().tobytes() for image, _ in loader})
    assert passes[0] == passes[1]


@pytest.mark.parametrize("dispatches", [True, False])
def test_an_epoch_that_is_told_is_in_force_in_a_loader_of_accelerate(tars, store, dispatches):
    """Each pass of the loader tells its own count, 0 where the one before ended in a break, to reader and draws."""
    stream = stream_of(tars, store, IGOverlay(overlay_prob=0.5))
    stream.transform = create_transform(16, is_training=True, scale=(0.2, 0.6))
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatches))
    loader = accelerator.prepare(DataLoader(stream, 1))
    found = []
    for epoch in (3, 4, 3):
        stream.set_epoch(epoch)
        found.append({image.numpy().tobytes() for image, _ in itertools.islice(loader, N)})
        assert (int(stream._epoch), stream.reader.epoch_count.value) == (epoch, epoch)
    assert found[0] == found[2]
    assert not found[0] & found[1]


def seen_pixels(items: Any) -> dict[bytes, int]:
    return {np.asarray(image).tobytes(): label for image, label in items}


def folder_route(images: ImageList, store: MapStore) -> dict[bytes, int]:
    dataset = IGOverlayDataset(images, store, EXACT, seed=0)
    return seen_pixels(dataset[index] for index in range(N))


def as_numbers(items: list) -> Any:
    return items  # a collate function that leaves PIL images as they are


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_blended_pixels_of_the_folder_route(images, store, tars, workers):
    stream = stream_of(tars, store)
    stream.set_loader_cfg(workers)
    loader = DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=as_numbers)
    assert seen_pixels(batch[0] for batch in loader) == folder_route(images, store)


def test_two_processes_see_each_image_once_through_the_shuffle_buffer(images, store, tars):
    parts = []
    for rank in range(2):
        dataset = timm_stream(tars, sample_shuffle_size=5, sample_initial_size=3)
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, 2
        parts.append(seen_pixels(IGOverlayStream(dataset, store, EXACT)))
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == folder_route(images, store)


def test_a_streaming_hub_dataset_gives_the_blended_pixels_of_the_folder_route(images, store, tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images.images, "label": images.labels}, features=features)
    rows.to_parquet(str(tmp_path / "rows" / "train.parquet"))
    dataset = create_dataset(f"hfids/{tmp_path / 'rows'}", split="train", is_training=True, num_samples=N)
    assert seen_pixels(IGOverlayStream(dataset, store, EXACT)) == folder_route(images, store)


# ---- draws


def draws_by_image(stream: IGOverlayStream, epochs: int = 1) -> dict[str, list[Any]]:
    """Return what an image's occurrences drew: a number of the transform's, and the exponent where it is overlaid."""
    found: dict[str, list[Any]] = defaultdict(list)
    powers: list[float] = []
    overlaid, item = stream.overlaid, stream._item

    def noted_overlaid(image: Image.Image, label: int, index: int | None, power: float) -> Image.Image:
        powers.append(power)
        return overlaid(image, label, index, power)

    def noted_item(image: Image.Image, *arguments: Any) -> tuple:
        powers.clear()
        result = item(image, *arguments)
        found[content_key(image)].append((result[0], *powers))
        return result

    stream.overlaid, stream._item = noted_overlaid, noted_item  # type: ignore[method-assign]
    stream.transform = lambda image: (float(torch.rand(())), random.random(), float(np.random.rand()))
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        list(stream)
    return found


def repeating(tars: Path, times: int = 4) -> Any:
    return timm_stream(tars, num_samples=times * N)


def test_another_run_draws_the_same_for_each_occurrence(store, tars):
    runs = [draws_by_image(IGOverlayStream(repeating(tars), store, IGOverlay(0.5), seed=3)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == N


def test_each_occurrence_of_an_image_draws_anew(store, tars):
    found = draws_by_image(IGOverlayStream(repeating(tars), store, IGOverlay(0.5), seed=3))
    assert all(len(draws) == 4 == len(set(draws)) for draws in found.values())
    coins = np.array([[len(draw) == 2 for draw in draws] for draws in found.values()])
    assert any(len(set(row)) == 2 for row in coins.tolist())  # some image is overlaid once and not another time
    assert 0.25 < coins.mean() < 0.75


def test_each_image_of_a_stream_draws_its_own(store, tars):
    found = draws_by_image(stream_of(tars, store, IGOverlay(1)))
    assert len({draws[0][0] for draws in found.values()}) == len({draws[0][1] for draws in found.values()}) == N


@pytest.mark.parametrize(("seed", "epoch"), [(4, 0), (3, 1)])
def test_another_seed_or_epoch_draws_anew(store, tars, seed, epoch):
    first = draws_by_image(IGOverlayStream(timm_stream(tars), store, IGOverlay(0.5), seed=3))
    second = draws_by_image(IGOverlayStream(timm_stream(tars), store, IGOverlay(0.5), seed=seed), epoch + 1)
    assert all(first[key][0] != second[key][epoch] for key in first)


def test_draws_do_not_depend_on_shards_and_processes(store, tars):
    alone = draws_by_image(IGOverlayStream(timm_stream(tars), store, IGOverlay(0.5), seed=3))
    for rank in range(2):
        dataset = timm_stream(tars, sample_shuffle_size=5, sample_initial_size=3)
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, 2
        assert draws_by_image(IGOverlayStream(dataset, store, IGOverlay(0.5), seed=3)).items() <= alone.items()


def test_a_script_that_tells_no_epoch_gets_new_draws_in_each_pass(store, tars):
    stream = stream_of(tars, store)
    stream.transform = lambda image: float(torch.rand(()))
    passes = [{number for number, _ in stream} for _ in range(2)]
    assert not passes[0] & passes[1]


def test_the_training_loops_own_random_numbers_stay_its_own(store, tars):
    stream = stream_of(tars, store)
    stream.transform = lambda image: float(torch.rand(()))
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    assert [float(torch.rand(())) for _ in zip(range(3), stream, strict=False)] == expected


def test_persistent_workers_learn_of_the_epoch(store, tars):
    stream = stream_of(tars, store)
    stream.set_loader_cfg(2)
    stream.transform = lambda image: float(torch.rand(()))
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=as_numbers, persistent_workers=True)
    found = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        found.append({batch[0][0] for batch in loader})
    assert found[0] == found[2]
    assert not found[0] & found[1]


# ---- timm's contract


def test_timms_loader_takes_a_stream(store, tars):
    loader = create_loader(
        stream_of(tars, store), (3, 8, 8), 4, is_training=True, auto_augment="rand-m9-inc1", device=torch.device("cpu")
    )
    assert len(loader) == 3
    assert [images.shape for images, _ in loader] == [(4, 3, 8, 8)] * 3


def test_the_op_in_a_randaugment_string_sets_a_streams_probability(store, tars):
    stream = stream_of(tars, store, IGOverlay(0))
    create_loader(stream, (3, 8, 8), 4, True, auto_augment="rand-m9-n2-p0.5-tigkd", device=torch.device("cpu"))
    assert stream.overlay_prob == pytest.approx(1 - (1 - 0.5 / 16) ** 2)


def test_two_views_of_a_stream_share_the_transform(store, tars):
    stream = stream_of(tars, store, teacher_view="clean")
    stream.transform = lambda image: (np.asarray(image), float(torch.rand(())))
    for ((student, first), (teacher, second)), _ in stream:
        assert first == second
        assert not np.array_equal(student, teacher)


def test_an_image_of_a_stream_without_a_map_is_an_error(images, tars, tmp_path):
    store = write_store(tmp_path, images, [ramp(index, 16, 16) for index in range(4)])
    with pytest.raises(InputError, match=r"image of stream '.*' has no map: the store covers the first 4 of 12"):
        list(stream_of(tars, store))


def test_looking_at_the_first_image_leaves_the_stream_as_it_was(images, store, tars):
    stream = stream_of(tars, store)
    stream.check_first_image()
    assert stream.reader.ds is None
    assert seen_pixels(stream) == folder_route(images, store)


def test_each_wrapper_refuses_the_others_kind(images, store, tars):
    with pytest.raises(InputTypeError, match=r"is a stream, .*; open it with .*hfids/.* and use IGOverlayStream"):
        IGOverlayDataset(timm_stream(tars), store)
    with pytest.raises(InputTypeError, match=r"IterableImageDataset, got a ImageList; open the .*hfids/"):
        IGOverlayStream(images, store)  # type: ignore[arg-type]


def test_stream_or_dataset_that_is_overlaid_already_is_refused_by_both(tars, store, images):
    for overlaid in (stream_of(tars, store), IGOverlayDataset(images, store, EXACT)):
        for wrapper in (IGOverlayStream, IGOverlayDataset):
            with pytest.raises(InputError, match=f"overlaid already, by the {type(overlaid).__name__} that holds it"):
                wrapper(overlaid, store, EXACT)
