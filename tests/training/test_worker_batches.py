"""Batches of DataLoader workers: pixels travel as bytes and are normalised on the device, in whole batches."""

import pytest
import torch
from tiny_parts import ImageList, noise_image
from torchvision import transforms

from timm_igkd import IGOverlayDataset
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
