"""What the overlay dataset draws for an image is that image's, that seed's and that process's."""

import pickle

import numpy as np
import pytest
import torch
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset


@pytest.fixture
def parts(tmp_path):
    dataset = ImageList([noise_image(seed) for seed in range(4)], [0] * 4)
    return dataset, write_store(tmp_path, dataset, [ramp(index, 16, 16) for index in range(4)])


def test_images_of_one_epoch_are_transformed_by_draws_of_their_own():
    dataset = IGOverlayDataset(ImageList([noise_image(0)] * 4, [0] * 4), None, seed=3)
    dataset.transform = lambda image: torch.rand(()).item()
    assert len({dataset[index][0] for index in range(4)}) == 4


@pytest.mark.parametrize("source", ["shuffled", "permuted", "noise"])
def test_random_controls_of_a_dataset_come_from_its_seed(source, parts):
    def overlaid(seed: int) -> np.ndarray:  # coin and exponent are the same for all seeds
        dataset = IGOverlayDataset(*parts, IGOverlay(1.0, max_power=1.0), overlay_source=source, seed=seed)
        return np.stack([dataset[index][0] for index in range(4)])

    seeds = [overlaid(seed) for seed in range(4)]
    assert any((seeds[0] != other).any() for other in seeds[1:])


def test_a_copy_in_another_process_draws_from_that_process(parts):
    dataset = IGOverlayDataset(*parts, IGOverlay(0.5))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = pickle.loads(pickle.dumps(dataset)).draw(0)
        torch.manual_seed(4)
        dataset.draw(0)
        torch.manual_seed(5)
        assert pickle.loads(pickle.dumps(dataset)).draw(0) == expected
