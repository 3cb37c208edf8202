"""The dataset wrapper: maps stay aligned under any transform, streams stay separate, both teacher views agree."""

import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader, create_transform
from timm.data.loader import fast_collate
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from timm_igkd.data.loading import load_labeled_images
from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.random_streams import seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python from 3.12 on

N, SIZE = 12, 32
EXACT = IGOverlay(overlay_prob=1, max_power=1)  # exponent 1: an image that equals its map does not change by a level
ALWAYS = IGOverlay(overlay_prob=1)
NEVER = IGOverlay(overlay_prob=0)
PIPELINES: dict[str, dict[str, Any]] = {
    "crop and flip": {"scale": (0.3, 1.0), "hflip": 0.5, "vflip": 0.5, "color_jitter": None},
    "colour jitter and blur": {"color_jitter": 0.4, "gaussian_blur_prob": 0.5, "grayscale_prob": 0.3},
    "RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "AugMix": {"auto_augment": "augmix-m5-w4-d2"},
    "AutoAugment": {"auto_augment": "original-mstd0.5"},
    "random erasing": {"re_prob": 0.9, "re_mode": "pixel", "re_count": 2},
}


@pytest.fixture(scope="module")
def ramps(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Images that equal their own maps, each a ramp of another direction."""
    images = [Image.fromarray(ramp(index, SIZE, SIZE)).convert("RGB") for index in range(N)]
    dataset = ImageList(images, [index % 3 for index in range(N)], name="ramps")
    folder = tmp_path_factory.mktemp("ramps")
    return dataset, write_store(folder, dataset, [ramp(index, SIZE, SIZE) for index in range(N)])


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Noise images with ramps as maps, so that an overlay changes every image."""
    dataset = ImageList([noise_image(seed, SIZE, SIZE) for seed in range(N)], [i % 3 for i in range(N)], name="noise")
    logits = [np.arange(3, dtype=np.float32) + index for index in range(N)]
    folder = tmp_path_factory.mktemp("noise")
    return dataset, write_store(folder, dataset, [ramp(index, SIZE, SIZE) for index in range(N)], logits=logits)


def pipeline(name: str) -> Callable:
    return create_transform(24, is_training=True, use_prefetcher=False, **PIPELINES[name])


def wrap(parts: tuple[ImageList, MapStore], overlay: IGOverlay, transform: Callable | None = None, **options: Any):
    options.setdefault("seed", 0)
    dataset = IGOverlayDataset(*parts, overlay, **options)
    dataset.transform = transform
    return dataset


def images_of(dataset) -> torch.Tensor:
    views = [dataset[index][0] for index in range(len(dataset))]
    return torch.stack([view if isinstance(view, torch.Tensor) else torch.from_numpy(np.array(view)) for view in views])


def loader_of(dataset, **options: Any):
    defaults = {"input_size": (3, 24, 24), "batch_size": 4, "is_training": True, "num_workers": 0}
    return create_loader(dataset, **defaults | {"device": torch.device("cpu"), "persistent_workers": False} | options)


def error_of_worker(loader) -> Exception | None:
    iterator = iter(loader)
    try:
        next(iterator)
    except Exception as error:
        error.__traceback__ = None  # it holds the iterator, which torch closes in 5 seconds when it is found by gc
        return error
    return None


# ---- alignment laws: an image that equals its map is the same with and without its overlay, whatever happens to it


def test_overlaid_ramp_is_the_ramp(ramps):
    assert torch.equal(images_of(wrap(ramps, EXACT)), images_of(wrap(ramps, NEVER)))


def test_a_ramp_shows_another_images_map(ramps):
    shuffled = images_of(wrap(ramps, EXACT, overlay_source="shuffled"))
    assert ((shuffled.int() - images_of(wrap(ramps, NEVER)).int()).abs().amax((1, 2, 3)) > 20).all()


@pytest.mark.parametrize("name", PIPELINES)
def test_map_follows_image_through(ramps, name):
    for seed in range(3):
        overlaid = images_of(wrap(ramps, EXACT, pipeline(name), seed=seed))
        assert torch.equal(overlaid, images_of(wrap(ramps, NEVER, pipeline(name), seed=seed)))


@pytest.mark.parametrize("name", ["crop and flip", "RandAugment"])
def test_a_shuffled_map_does_not_follow(ramps, name):
    """The law above can fail."""
    overlaid = images_of(wrap(ramps, EXACT, pipeline(name), overlay_source="shuffled"))
    assert not torch.allclose(overlaid, images_of(wrap(ramps, NEVER, pipeline(name))), atol=0.2)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_cropped_overlay_is_the_crop_of_image_and_map(noisy, flip):
    """The same crop and flip of image and map, blended after it, give the overlaid view up to interpolation's
    rounding."""
    geometric = create_transform(24, is_training=True, hflip=flip, color_jitter=None, use_prefetcher=True)
    dataset, _ = noisy
    for seed in range(N):
        levels = Image.fromarray(ramp(seed, SIZE, SIZE)).convert("RGB")
        overlaid = EXACT.apply(dataset[seed][0], levels.convert("L"), 1.0)
        views = []
        for image in (dataset[seed][0], levels, overlaid):
            with seeded(seed):
                views.append(geometric(image).float().numpy())
        assert np.abs((views[0] + views[1]) / 2 - views[2]).max() <= 2


def test_torchvision_transforms_follow_too(ramps):
    transform = v2.Compose(
        [v2.RandomResizedCrop(24), v2.RandomPerspective(p=1), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    assert torch.equal(images_of(wrap(ramps, EXACT, transform)), images_of(wrap(ramps, NEVER, transform)))


@pytest.mark.parametrize("use_prefetcher", [True, False])
def test_map_follows_image_through_create_loader(ramps, use_prefetcher):
    batches = []
    for overlay in (EXACT, NEVER):
        torch.manual_seed(0)
        loader = loader_of(wrap(ramps, overlay), use_prefetcher=use_prefetcher, auto_augment="rand-m9-mstd0.5-inc1")
        batches.append(torch.cat([images for images, _ in loader]))
    assert batches[0].shape == (N, 3, 24, 24)
    assert torch.equal(*batches)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_map_follows_image_through_timms_mixup_collate(ramps, mode):
    mixed = []
    for overlay in (EXACT, NEVER):
        torch.manual_seed(0)
        np.random.seed(0)
        collate = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, num_classes=3)
        mixed += [torch.cat([images for images, _ in loader_of(wrap(ramps, overlay), collate_fn=collate)])]
    assert torch.equal(*mixed)


@pytest.mark.parametrize("arguments", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_map_follows_image_through_timms_mixup(ramps, arguments):
    mixed = []
    for overlay in (EXACT, NEVER):
        images, labels = next(iter(DataLoader(wrap(ramps, overlay, pipeline("crop and flip")), batch_size=N)))
        with seeded(3):
            mixed.append(Mixup(num_classes=3, **arguments)(images, labels)[0])
    assert torch.equal(*mixed)


# ---- separate streams


@pytest.mark.parametrize("seed", [0, None])
def test_overlays_are_on_about_the_asked_share(noisy, seed):
    torch.manual_seed(0)
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.3), seed=seed)
    coins = [dataset.draw(index)[0] for index in range(3000)]
    assert 0.27 < np.mean(coins) < 0.33


def test_exponents_are_spread_over_their_range(noisy):
    powers = [wrap(noisy, ALWAYS).draw(index)[1] for index in range(500)]
    assert 1 <= min(powers) < 1.02
    assert 1.96 < max(powers) <= 2
    assert abs(np.mean(np.log(powers)) / np.log(2) - 0.5) < 0.06


def test_share_0_and_1_are_never_and_always(noisy):
    assert not any(wrap(noisy, NEVER).draw(index)[0] for index in range(500))
    assert all(wrap(noisy, ALWAYS).draw(index)[0] for index in range(500))


def test_overlaid_images_at_a_lower_share_are_among_those_at_a_higher(noisy):
    few, many = (
        {index for index in range(500) if wrap(noisy, IGOverlay(overlay_prob=p)).draw(index)[0]} for p in (0.1, 0.4)
    )
    assert few < many


@pytest.mark.parametrize("seed", [0, None])
def test_overlay_prob_does_not_change_the_crops(noisy, seed):
    views = []
    for overlay in (NEVER, IGOverlay(overlay_prob=0.5)):
        with seeded(1):
            dataset = wrap(noisy, overlay, pipeline("RandAugment"), seed=seed)
            coins = [dataset.draw(index)[0] for index in range(N)] if seed is not None else None
            views.append(images_of(dataset))
    same = (views[0] == views[1]).flatten(1).all(1)
    assert 0 < same.sum() < N
    if coins is not None:
        assert same.tolist() == [not coin for coin in coins]


@pytest.mark.parametrize("seed", [0, None])
def test_transform_does_not_change_which_images_are_overlaid(noisy, seed):
    found = []
    for name in (None, "RandAugment", "crop and flip"):
        seen: list[tuple[int, float]] = []
        with seeded(1):
            dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), pipeline(name) if name else None, seed=seed)
            overlaid = dataset.overlaid
            dataset.overlaid = lambda *args, o=overlaid, s=seen: (s.append(args[2:]), o(*args))[1]
            images_of(dataset) if name else [dataset[index] for index in range(N)]
        found.append(seen)
    assert 0 < len(found[0]) < N
    assert found[0] == found[1] == found[2]


def test_epochs_draw_other_coins_and_other_crops(noisy):
    dataset = wrap(noisy, NEVER, pipeline("crop and flip"))
    first = images_of(dataset)
    coins = [dataset.draw(index) for index in range(N)]
    dataset.set_epoch(1)
    assert not (images_of(dataset) == first).flatten(1).all(1).any()
    assert coins != [dataset.draw(index) for index in range(N)]
    dataset.set_epoch(0)
    assert torch.equal(images_of(dataset), first)


def test_only_a_seeded_dataset_takes_the_epoch(noisy):
    """timm's train.py tells the distributed sampler the epoch only where the dataset has no set_epoch."""
    assert hasattr(wrap(noisy, NEVER, seed=0), "set_epoch")
    assert not hasattr(wrap(noisy, NEVER, seed=None), "set_epoch")


def test_runs_of_one_seed_repeat_and_two_differ(noisy):
    def run(seed: int) -> torch.Tensor:
        return images_of(wrap(noisy, ALWAYS, pipeline("RandAugment"), seed=seed))

    assert torch.equal(run(4), run(4))
    assert not torch.equal(run(4), run(5))


def test_a_seeded_item_leaves_the_global_generators(noisy):
    dataset = wrap(noisy, ALWAYS, pipeline("RandAugment"), teacher_view="clean")
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(()), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    dataset[0]
    assert (torch.rand(()), np.random.rand()) == expected


@pytest.mark.parametrize("seed", [0, None])
def test_a_batch_holds_the_items_one_by_one(noisy, seed):
    def views(read: Callable) -> list[torch.Tensor]:
        dataset = wrap(noisy, IGOverlay(0.5), pipeline("RandAugment"), teacher_view="clean", seed=seed)
        with seeded(3):
            return [view for views, _ in read(dataset) for view in views]

    order = [3, 0, 7]
    alone, batch = (
        views(lambda dataset: [dataset[i] for i in order]),
        views(lambda dataset: dataset.__getitems__(order)),
    )
    assert all(torch.equal(first, second) for first, second in zip(alone, batch, strict=True))


@pytest.mark.parametrize("view", ["same", "clean"])
def test_workers_do_not_change_the_items_of_a_seed(noisy, view):
    def run(workers: int) -> torch.Tensor:
        dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), teacher_view=view)
        torch.manual_seed(0)
        loader = loader_of(dataset, num_workers=workers, auto_augment="rand-m9-mstd0.5-inc1")
        return torch.cat([images for images, _ in loader])

    assert torch.equal(run(0), run(2))


def test_persistent_workers_see_the_epoch(noisy):
    dataset = wrap(noisy, NEVER, pipeline("crop and flip"))
    loader = DataLoader(dataset, batch_size=N, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2, 0):
        dataset.set_epoch(epoch)
        (images, _) = next(iter(loader))
        assert torch.equal(images, images_of(dataset))


def test_workers_without_a_seed_draw_different_coins(noisy):
    coins = IGOverlayDataset(*noisy, IGOverlay(overlay_prob=0.5))
    drawn = list(DataLoader(Coins(coins), batch_size=50, num_workers=2))
    assert not torch.equal(drawn[0], drawn[1])


class Coins(torch.utils.data.Dataset):
    def __init__(self, dataset: IGOverlayDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> float:
        return self.dataset.draw(index)[1]


# ---- the teacher's view


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("name", PIPELINES)
def test_teachers_view_is_the_clean_image_under_the_same_draws(noisy, name, seed):
    with seeded(2):
        pairs = [
            item[0]
            for item in map(wrap(noisy, ALWAYS, pipeline(name), seed=seed, teacher_view="clean").__getitem__, range(N))
        ]
    with seeded(2):
        clean = images_of(wrap(noisy, NEVER, pipeline(name), seed=seed))
    with seeded(2):
        student = images_of(wrap(noisy, ALWAYS, pipeline(name), seed=seed))
    assert torch.equal(torch.stack([pair[1] for pair in pairs]), clean)
    assert torch.equal(torch.stack([pair[0] for pair in pairs]), student)
    assert not torch.equal(clean, student)


def test_views_of_an_image_without_overlay_are_one_object(noisy):
    (student, teacher), _ = wrap(noisy, NEVER, pipeline("RandAugment"), teacher_view="clean")[0]
    assert student is teacher


def test_random_erasing_erases_the_same_pixels_of_both_views(noisy):
    transform = create_transform(24, is_training=True, use_prefetcher=False, re_prob=1.0, mean=(0,) * 3, std=(1,) * 3)
    for index in range(N):
        (student, teacher), _ = wrap(noisy, ALWAYS, transform, teacher_view="clean")[index]
        assert (teacher == 0).all(0).any()
        assert torch.equal((student == 0).all(0), (teacher == 0).all(0))


def test_create_loader_whose_prefetcher_erases_is_refused_for_two_views(noisy):
    with pytest.raises(InputError, match=r"erases the two views differently; use create_loader.use_prefetcher=False"):
        loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), re_prob=0.5)


@pytest.mark.parametrize(
    ("view", "options"),
    [
        ("clean", {}),
        ("clean", {"re_prob": 0.5, "use_prefetcher": False}),
        ("clean", {"re_prob": 0.5, "is_training": False}),
        ("clean", {"re_prob": 0.5, "no_aug": True}),
        ("same", {"re_prob": 0.5}),
    ],
)
def test_loaders_that_erase_both_views_alike_are_made(view, options, noisy):
    assert len(loader_of(wrap(noisy, ALWAYS, teacher_view=view), **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_view_batches_of_the_prefetcher_are_what_the_task_takes(noisy, workers):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), teacher_view="clean")
    torch.manual_seed(0)
    loader = loader_of(dataset, num_workers=workers)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 24, 24)
    assert torch.equal(labels[:4], labels[4:])
    overlaid = [(student != teacher).any().item() for student, teacher in zip(*images.chunk(2), strict=True)]
    assert any(overlaid)
    assert not all(overlaid)
    task = IGDistillationTask(
        tiny_teacher(classes=3),
        tiny_teacher(classes=3, seed=1),
        teacher_view="clean",
        view_layout="flat",
        verbose=False,
    )
    assert task(images, labels)["output"].shape == (4, 3)


def test_two_views_without_prefetcher_come_apart(noisy):
    (student, teacher), labels = next(iter(loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), use_prefetcher=False)))
    assert student.shape == teacher.shape == (4, 3, 24, 24)
    assert not torch.equal(student, teacher)
    assert labels.shape == (4,)


def test_students_batches_of_the_prefetcher_are_timms(noisy):
    images, labels = next(iter(loader_of(wrap(noisy, ALWAYS), num_workers=2)))
    assert (images.shape, labels.shape) == ((4, 3, 24, 24), (4,))


# ---- Mixup


def test_timms_mixup_collate_names_the_two_views(noisy):
    dataset = wrap(noisy, ALWAYS, pipeline("crop and flip"), teacher_view="clean")
    collate = FastCollateMixup(mixup_alpha=0.8, num_classes=3)
    with pytest.raises(InputTypeError, match=r"FastCollateMixup cannot mix a dataset with two views .*TwoViewMixup"):
        collate([dataset[index] for index in range(4)])


def test_timms_mixup_collate_names_the_two_views_from_a_worker(noisy):
    collate = FastCollateMixup(mixup_alpha=0.8, num_classes=3)
    loader = loader_of(wrap(noisy, ALWAYS, teacher_view="clean"), num_workers=1, collate_fn=collate)
    error = error_of_worker(loader)
    assert isinstance(error, InputTypeError)
    assert "FastCollateMixup cannot mix a dataset with two views" in str(error)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_two_view_mixup_mixes_both_views_alike(mode, kind):
    mixup = TwoViewMixup(seed=1, num_classes=3, mode=mode, **kind)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    student, teacher, target = mixup(images, images.clone(), labels, 0, 5)
    assert torch.equal(student, teacher)
    assert not torch.equal(student, images)
    assert target.shape == (8, 3)
    other = mixup(images, images + 1, labels, 0, 5)[1]
    torch.testing.assert_close(other, teacher + 1)  # mixing is linear, so a shifted view is mixed to a shifted result


def test_two_view_mixup_without_a_teacher_draws_the_same():
    mixup = TwoViewMixup(seed=1, num_classes=3, mixup_alpha=0.8)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    both, alone = mixup(images, images, labels, 0, 5), mixup(images, None, labels, 0, 5)
    assert alone[1] is None
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[2], alone[2])


def test_two_view_mixup_draws_by_seed_epoch_and_batch_and_leaves_its_input():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    before = images.clone()

    def mixed(seed: int, *stream: int) -> torch.Tensor:
        return TwoViewMixup(seed=seed, num_classes=3, mixup_alpha=0.8)(images, images, labels, *stream)[2]

    assert torch.equal(mixed(0, 1, 2), mixed(0, 1, 2))
    assert len({tuple(mixed(*stream)[0].tolist()) for stream in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))}) == 4
    assert torch.equal(images, before)


# ---- rows are found by content


@pytest.mark.parametrize("order", [[3, 1, 4], list(range(N))[::-1]], ids=["subset", "reversed"])
def test_subset_finds_its_rows(ramps, order):
    dataset, store = ramps
    part = wrap((Subset(dataset, order), store), EXACT)
    assert torch.equal(images_of(part), images_of(wrap(ramps, NEVER))[order])


def test_random_split_and_concatenation_find_their_rows(ramps):
    dataset, store = ramps
    parts = torch.utils.data.random_split(dataset, [5, N - 5])
    joined = wrap((torch.utils.data.ConcatDataset(parts), store), EXACT)
    order = [*parts[0].indices, *parts[1].indices]
    assert torch.equal(images_of(joined), images_of(wrap(ramps, NEVER))[order])


def test_subset_and_shuffle_of_labeled_images_find_their_rows(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images(n=8)), "train")
    store = write_store(tmp_path / "maps", images, [ramp(index, 16, 16) for index in range(8)])
    whole = [IGOverlayDataset(images, store, ALWAYS, seed=0).overlaid(*images[i], i, 1.0).tobytes() for i in range(8)]
    order = [6, 2, 0, 7, 1]
    part = IGOverlayDataset(images.subset(order), store, ALWAYS, seed=0)
    assert [part.overlaid(*part.dataset[i], i, 1.0).tobytes() for i in range(5)] == [whole[i] for i in order]


def test_equal_images_take_the_row_with_their_label(tmp_path):
    twins = ImageList([noise_image(0)] * 3, [2, 0, 1])
    store = write_store(tmp_path, twins, [ramp(index, 16, 16) for index in range(3)])
    shuffled = ImageList([noise_image(0)] * 3, [1, 2, 0])
    dataset = IGOverlayDataset(shuffled, store, ALWAYS, seed=0)
    for index, row in enumerate((2, 0, 1)):
        expected = ALWAYS.apply(noise_image(0), Image.fromarray(ramp(row, 16, 16)), 1.0)
        assert dataset.overlaid(noise_image(0), shuffled.labels[index], index, 1.0).tobytes() == expected.tobytes()


def test_map_of_another_label_is_an_error(ramps):
    dataset, store = ramps
    relabelled = ImageList(dataset.images, [label + 1 for label in dataset.labels], name="relabelled")
    with pytest.raises(InputError, match="image 0 of 'relabelled' has label 1, but its map was made for label 0"):
        wrap((relabelled, store), ALWAYS)[0]


def test_map_of_the_predicted_class_fits_any_label(tmp_path):
    dataset = ImageList([noise_image(0)], [0])
    store = write_store(tmp_path, dataset, [ramp(0, 16, 16)], target="predicted")
    wrap((ImageList([noise_image(0)], [5]), store), ALWAYS)[0]


def test_missing_map_names_the_image_and_the_remedy(ramps):
    stranger = ImageList([*ramps[0].images[:2], noise_image(77)], [0, 1, 2], name="strangers")
    dataset = wrap((stranger, ramps[1]), ALWAYS)
    dataset[1]
    with pytest.raises(InputError, match=r"image 2 of 'strangers' has no map: .*build maps of this data"):
        dataset[2]


def test_missing_map_is_named_from_a_worker(ramps):
    stranger = ImageList([noise_image(77)], [0], name="strangers")
    loader = DataLoader(wrap((stranger, ramps[1]), ALWAYS, pipeline("crop and flip")), num_workers=1)
    error = error_of_worker(loader)
    assert isinstance(error, InputError)
    assert "image 0 of 'strangers' has no map" in str(error)


def test_training_beyond_a_prefix_is_an_error_that_says_so(tmp_path):
    dataset = ImageList([noise_image(seed) for seed in range(5)], [0] * 5, name="five")
    prefix = write_store(tmp_path, dataset, [ramp(0, 16, 16)] * 3)
    overlaid = wrap((dataset, prefix), ALWAYS)
    overlaid[2]
    with pytest.raises(
        InputError, match=r"image 3 of 'five' has no map: the store covers the first 3 of 5 .*without --limit"
    ):
        overlaid[3]


def test_an_unreadable_file_is_not_replaced_by_timms_next_image(tiny_images, tmp_path):
    folder = tiny_images(kind="folder") / "train"
    dataset = timm.data.ImageDataset(str(folder))
    store = write_store(tmp_path / "maps", load_labeled_images(str(folder.parent), "train"), [ramp(0, 16, 16)] * 8)
    overlaid = IGOverlayDataset(dataset, store, ALWAYS, seed=0)
    overlaid[1]
    (folder / "class_0" / "0002.png").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"0002\.png.* cannot be decoded"):
        overlaid[1]


# ---- the wrapper's contract


def test_signed_maps_overlay_their_positive_part(tmp_path):
    dataset = ImageList([noise_image(0)], [0])
    signed = np.full((16, 16), 128, np.uint8)
    signed[:8], signed[8:12] = 255, 1
    store = write_store(tmp_path, dataset, [signed], reduction="sum")
    found = np.asarray(wrap((dataset, store), EXACT)[0][0]).astype(int)
    half = np.asarray(noise_image(0)) / 2
    assert np.abs(found[:8] - half[:8] - 127.5).max() <= 1
    assert np.abs(found[8:] - half[8:]).max() <= 1


def test_items_can_end_with_the_stored_logits(noisy):
    dataset = wrap(noisy, NEVER, pipeline("crop and flip"), with_logits=True)
    _, label, logits = dataset[4]
    assert label == 1
    assert torch.equal(logits, torch.arange(3.0) + 4)
    assert next(iter(DataLoader(dataset, batch_size=5)))[2].shape == (5, 3)


def test_logits_follow_their_images_in_a_subset(noisy):
    dataset = wrap((Subset(noisy[0], [7, 3]), noisy[1]), ALWAYS, with_logits=True)
    assert dataset[0][2].tolist() == [7, 8, 9]
    assert dataset[1][2].tolist() == [3, 4, 5]


def test_store_without_logits_is_refused_when_they_are_asked_for(ramps):
    with pytest.raises(InputError, match="has no logits; rebuild it with --logits"):
        wrap(ramps, ALWAYS, with_logits=True)


def test_dataset_without_maps_serves_an_arm_without_overlay(noisy):
    plain = wrap((noisy[0], None), None, pipeline("RandAugment"))
    assert torch.equal(images_of(plain), images_of(wrap(noisy, NEVER, pipeline("RandAugment"))))


@pytest.mark.parametrize("options", [{"overlay": ALWAYS}, {"overlay": NEVER, "with_logits": True}])
def test_overlay_or_logits_without_maps_are_refused(noisy, options):
    with pytest.raises(InputError, match="need maps, got none; build them: timm-igkd maps"):
        IGOverlayDataset(noisy[0], None, **options)


def test_dataset_with_a_transform_is_refused(noisy):
    dataset = ImageList(noisy[0].images, noisy[0].labels)
    dataset.transform = torchvision.transforms.ToTensor()
    with pytest.raises(
        InputError, match=r"'list' has a transform already; .* set the transform on the IGOverlayDataset"
    ):
        IGOverlayDataset(dataset, noisy[1])
    with pytest.raises(InputError, match="'list' has a transform already"):
        IGOverlayDataset(Subset(dataset, [0]), noisy[1])


def test_unknown_view_is_refused(noisy):
    with pytest.raises(InputError, match="teacher_view must be one of same, clean, got 'both'"):
        wrap(noisy, ALWAYS, teacher_view="both")


def test_untransformed_items_are_pil_images(noisy):
    image, label = wrap(noisy, ALWAYS)[1]
    assert isinstance(image, Image.Image)
    assert label == 1


def test_fast_collate_takes_a_seedless_dataset(noisy):
    dataset = IGOverlayDataset(*noisy, teacher_view="clean")
    dataset.transform = create_transform(24, is_training=True, use_prefetcher=True)
    images, labels = fast_collate([dataset[index] for index in range(N)])
    assert (images.shape, images.dtype, labels.shape) == ((2 * N, 3, 24, 24), torch.uint8, (2 * N,))


def test_pickled_dataset_gives_the_same_items(noisy):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), pipeline("RandAugment"), teacher_view="clean")
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[index][0][view], dataset[index][0][view]) for index in range(N) for view in (0, 1))


def test_pickled_store_does_not_hold_the_maps(noisy):
    assert len(pickle.dumps(noisy[1])) < 20_000


@pytest.mark.slow
def test_spawned_persistent_workers_give_the_same_items_and_see_the_epoch(noisy):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), pipeline("RandAugment"))
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(dataset, batch_size=N, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        assert torch.equal(next(iter(loader))[0], images_of(dataset))


def test_exponents_of_overlaid_images_are_spread_over_their_range(noisy):
    """One number for coin and strength would overlay a tenth of the images with the weakest exponents alone."""
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.1, max_power=2.0), seed=0)
    drawn = []
    for epoch in range(200):
        dataset.set_epoch(epoch)
        drawn += [dataset.draw(index) for index in range(50)]
    powers = np.array([power for is_overlaid, power in drawn if is_overlaid])
    assert 0.08 < len(powers) / len(drawn) < 0.12
    shares, _ = np.histogram(np.log(powers) / np.log(2), bins=4, range=(0, 1))
    assert shares / len(powers) == pytest.approx([0.25] * 4, abs=0.06), shares
