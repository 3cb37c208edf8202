"""The dataset wrapper: maps stay aligned under any transform, and streams of random numbers stay separate."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from overlay_parts import ALWAYS, EXACT, NEVER, PIPELINES, SIZE, N, images_of, loader_of, pipeline, wrap
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_transform
from tiny_parts import ramp
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.random_streams import seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python from 3.12 on

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


def test_an_index_outside_is_an_index_error(noisy):
    """-13 of 12 images was the last one."""
    dataset = wrap(noisy, NEVER)
    assert len(list(dataset)) == N
    for index in (N, -N - 1, -2 * N):
        with pytest.raises(IndexError, match=rf"index {index} is outside of {N} images"):
            dataset[index]
    with pytest.raises(IndexError, match=f"index {N} is outside"):
        dataset.__getitems__([0, N])


def test_negative_indices_are_the_items_from_the_end(noisy):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), pipeline("crop and flip"))
    for index in range(1, N + 1):
        image, label = dataset[-index]
        wanted, wanted_label = dataset[N - index]
        assert torch.equal(image, wanted)
        assert label == wanted_label


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
