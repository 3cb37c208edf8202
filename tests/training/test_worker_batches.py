"""Batches of DataLoader workers: pixels travel as bytes and are normalised on the device, in whole batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from tiny_parts import ImageList, noise_image, ramp, write_store
from torchvision import transforms

from timm_igkd import IGOverlay, IGOverlayDataset
from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.errors import InputError
from timm_igkd.overlay.controls import derangement
from timm_igkd.overlay.timm_ops import posterize_to_black
from timm_igkd.random_streams import seed_global
from timm_igkd.training.augmentation import TrainAugmentation
from timm_igkd.training.batch import epoch_order
from timm_igkd.training.worker_batches import WorkerBatches

CPU, N, SIZE = torch.device("cpu"), 6, 16
CONFIG = {"input_size": (3, SIZE, SIZE), "mean": (0.485, 0.456, 0.406), "std": (0.2, 0.3, 0.4)}
CONFIG["interpolation"] = "bilinear"


def images() -> ImageList:
    return ImageList([noise_image(seed, SIZE, SIZE) for seed in range(N)], list(range(N)))


def batches(augmentation: TrainAugmentation, seed: int = 0) -> list[torch.Tensor]:
    dataset = IGOverlayDataset(images(), None, seed=seed)
    dataset.transform = augmentation.transform(CONFIG)
    made = WorkerBatches(dataset, 3, seed, CPU, mean=CONFIG["mean"], std=CONFIG["std"])
    return [batch.student for batch in made.epoch(0)]


def test_views_are_normalised_bit_for_bit_as_torchvision_normalises_each_image():
    alone = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CONFIG["mean"], CONFIG["std"])])
    expected = [alone(images()[int(index)][0]) for index in epoch_order(N, 3, 2, 0, 0)]
    found = torch.cat(batches(TrainAugmentation(train_crop="none")))
    assert torch.equal(found, torch.stack(expected))
    assert found.is_contiguous()


@pytest.mark.parametrize("crop", ["pad", "rrc"])
def test_random_erasing_is_of_normalised_images_and_changes_no_other_draw(crop):
    """Where nothing is erased, images that are normalised one by one equal those of whole batches."""
    seldom = TrainAugmentation(train_crop=crop, hflip=0.5, reprob=1e-9)
    never = TrainAugmentation(train_crop=crop, hflip=0.5)
    for first, second in zip(batches(seldom), batches(never), strict=True):
        assert torch.equal(first, second)


def test_pixels_travel_as_bytes():
    """A quarter of the memory that workers and trainer share."""
    item = TrainAugmentation().transform(CONFIG)(images()[0][0])
    assert (item.dtype, item.shape) == ("uint8", (3, SIZE, SIZE))


# ---- maps of the views


def ramps(folder, source="aligned", **options):
    """Return a wrapped dataset of grey images that are their own maps."""
    levels = [ramp(index, SIZE, SIZE) for index in range(N)]
    grey = ImageList([Image.fromarray(each).convert("RGB") for each in levels], list(range(N)))
    store = write_store(folder, grey, levels, logits=[np.full(N, index, np.float32) for index in range(N)])
    overlay = IGOverlay(options.pop("overlay_prob", 0.0))
    return IGOverlayDataset(grey, store, overlay, overlay_source=source, with_maps=True, **options)


@pytest.mark.parametrize("crop", ["none", "pad", "rrc"])
@pytest.mark.parametrize("view", ["same", "clean"])
def test_maps_follow_their_images_through_crop_and_flip(crop, view, tmp_path):
    dataset = ramps(tmp_path, seed=0, teacher_view=view, with_logits=True)
    dataset.transform = TrainAugmentation(train_crop=crop, hflip=0.5).transform(CONFIG)
    for batch in WorkerBatches(dataset, 3, 0, CPU).epoch(1):
        assert torch.equal(batch.maps, batch.student[:, :1])  # with it the black border, where the map is 0
        assert batch.maps.std() > 0.1
        assert torch.equal(batch.logits[:, 0], batch.labels.float())


def test_maps_follow_an_unseeded_transform_and_change_none_of_its_draws(tmp_path):
    dataset = ramps(tmp_path)
    transform = dataset.transform = TrainAugmentation(train_crop="rrc", hflip=0.5).transform(CONFIG)
    seed_global(3)
    view, _, levels = dataset[0]
    seed_global(3)
    assert (view == transform(dataset.dataset[0][0])).all()
    assert (levels.numpy() == view[:1]).all()


def test_an_overlaid_image_keeps_the_map_of_the_image(tmp_path):
    plain, overlaid = (ramps(tmp_path / str(prob), seed=0, overlay_prob=prob) for prob in (0.0, 1.0))
    for dataset in (plain, overlaid):
        dataset.transform = TrainAugmentation(hflip=0.5).transform(CONFIG)
    assert torch.equal(plain[1][2], overlaid[1][2])


def test_maps_are_those_that_the_source_names(tmp_path):
    dataset = ramps(tmp_path, "shuffled", seed=0)
    dataset.transform = TrainAugmentation(train_crop="none").transform(CONFIG)
    other = dataset.dataset[int(derangement(N, 0)[2])][0]
    assert (dataset[2][2][0].numpy() == np.asarray(other)[..., 0]).all()


@pytest.mark.parametrize("transform", [None, transforms.ToTensor()])
def test_a_transform_that_would_change_the_maps_values_is_refused(transform, tmp_path):
    dataset = ramps(tmp_path, seed=0)
    dataset.transform = transform
    with pytest.raises(InputError, match="maps of views need a transform that ends in uint8 pixels"):
        dataset[0]


def test_maps_of_mixed_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="Mixup and CutMix leave no map to an image"):
        WorkerBatches(ramps(tmp_path, seed=0), 2, 0, CPU, mixup=TwoViewMixup(mixup_alpha=0.2, num_classes=N))


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5", "augmix-m5-w2", "v0", "original", "3a"])
@pytest.mark.parametrize("crop", ["pad", "rrc"])
def test_every_auto_augment_string_of_timm_is_read_whatever_the_crop(aa, crop):
    transform = TrainAugmentation(train_crop=crop, aa=aa).transform(CONFIG)
    assert np.asarray(transform(images()[0][0])).shape == tuple(CONFIG["input_size"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["pad", "none"])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m9-w3-d2", "original-mstd0.5", "3a"])
def test_auto_augment_of_whole_images_is_timms(aa, crop, interpolation):
    """An interpolation was drawn for each op, and AugMix shifted by half as much again."""
    kinds = auto_augment.RandAugment | auto_augment.AugMixAugment | auto_augment.AutoAugment
    config = CONFIG | {"mean": (0.999, 0.456, 0.406), "interpolation": interpolation}
    with posterize_to_black():
        timms = create_transform(
            SIZE, is_training=True, auto_augment=aa, interpolation=interpolation, mean=config["mean"], std=config["std"]
        )
    ours = TrainAugmentation(train_crop=crop, aa=aa).transform(config)
    found = []
    for pipeline in (timms, ours):
        (policy,) = (part for part in pipeline.transforms if isinstance(part, kinds))
        views = []
        for seed in range(40):
            seed_global(seed)
            views.append(np.asarray(policy(images()[0][0])))
        found.append(np.stack(views))
    assert np.array_equal(*found)


def test_only_an_auto_augment_string_that_was_given_is_at_fault():
    with pytest.raises(InputError, match=r"aa must be a timm auto-augment string .* got 'nope'"):
        TrainAugmentation(aa="nope").transform(CONFIG)
    with pytest.raises(KeyError, match="random"):  # no way to resize a whole image
        TrainAugmentation().transform(CONFIG | {"interpolation": "random"})


@pytest.mark.parametrize("crop", ["none", "pad"])
def test_colour_jitter_is_refused_with_a_crop_that_has_none(crop):
    with pytest.raises(InputError, match=f"color_jitter goes .* rrc alone, got 0.4 with {crop}; set train_crop to rrc"):
        TrainAugmentation(train_crop=crop, color_jitter=0.4)


@pytest.mark.parametrize("aa", [None, "3a"])
def test_colour_jitter_changes_colours_of_resized_crops(aa):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    seed_global(0)
    found = TrainAugmentation(train_crop="rrc", color_jitter=0.9, aa=aa).transform(CONFIG)(image)
    assert found[:, 0, 0].tolist() != [200, 100, 50]


def test_colour_jitter_is_refused_beside_what_timm_has_none_with():
    with pytest.raises(InputError, match=r"no color_jitter beside aa, got 0.9 and 'rand-m9-n2'; drop one"):
        TrainAugmentation(train_crop="rrc", color_jitter=0.9, aa="rand-m9-n2")


@pytest.mark.parametrize("aa", ["rand-m9-n2-tigkd", "rand-tigkd-m9", "rand-m9-p0.5-tigkd-inc1"])
def test_an_overlay_among_the_augmentations_is_refused(aa):
    with pytest.raises(InputError, match=r"overlay comes before all .*; drop tigkd, set overlay_prob"):
        TrainAugmentation(train_crop="rrc", aa=aa)


def test_images_are_resized_as_the_models_are_in_evaluation():
    image, config = images()[0][0].resize((48, 48)), CONFIG | {"interpolation": "nearest"}
    found = TrainAugmentation(train_crop="none").transform(config)(image)
    expected = image.resize(CONFIG["input_size"][:0:-1], Image.Resampling.NEAREST)
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))
