"""What the overlay dataset draws for an image is that image's, that seed's and that process's."""

import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.errors import InputError, InputTypeError
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


@pytest.mark.parametrize("seed", ["0", 0.5])
def test_a_seed_that_is_no_whole_number_is_refused_when_it_is_given(seed):
    with pytest.raises((InputError, InputTypeError), match=r"seed must be a (whole )?number"):
        IGOverlayDataset(ImageList([noise_image(0)], [0]), None, seed=seed)


# ---- behind a loader that Accelerate prepared, which tells the dataset its own count of passes


def epochs_in_force(
    tell: Callable[[Any, Any, int], None], epochs: Sequence[int], most: int = 5, **options: Any
) -> list[int]:
    """Return by which epochs the passes of a prepared loader of four batches draw; fewer than 5 end in a break."""
    dataset = IGOverlayDataset(ImageList([noise_image(seed) for seed in range(4)], [0] * 4), None, seed=3)
    dataset.transform = lambda image: int(dataset._epoch)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    loader = accelerator.prepare(torch.utils.data.DataLoader(dataset, 1, shuffle=True))
    found = []
    for epoch in epochs:
        tell(dataset, loader, epoch)
        drawn = {int(views) for views, _ in itertools.islice(loader, most)}
        assert len(drawn) == 1
        found += drawn
    return found


PREPARED: list[dict[str, bool]] = [{}, {"use_seedable_sampler": True}, {"dispatch_batches": True}]


@pytest.mark.parametrize("options", PREPARED)
@pytest.mark.parametrize("most", [5, 1])
def test_the_epoch_that_the_script_tells_the_dataset_is_in_force_in_a_prepared_loader(most, options):
    """It was 0, 1, 2, and 0 in every epoch that ended with a break."""
    told = [5, 6, 7, 5]
    assert epochs_in_force(lambda dataset, _, epoch: dataset.set_epoch(epoch), told, most, **options) == told


@pytest.mark.parametrize("options", PREPARED)
@pytest.mark.parametrize("most", [5, 1])
def test_the_epoch_that_the_script_tells_a_prepared_loader_is_in_force(most, options):
    told = [5, 6, 7, 5]
    assert epochs_in_force(lambda _, loader, epoch: loader.set_epoch(epoch), told, most, **options) == told


@pytest.mark.parametrize("options", PREPARED)
def test_a_prepared_loader_counts_its_passes_where_the_script_tells_no_epoch(options):
    assert epochs_in_force(lambda *_: None, (0, 0, 0), **options) == [0, 1, 2]

    def told_once(_: Any, loader: Any, epoch: int) -> None:
        if epoch:
            loader.set_epoch(epoch)

    assert epochs_in_force(told_once, (5, 0, 0), **options) == [5, 6, 7]


def test_who_tells_the_epoch_last_has_the_say():
    def both(dataset: Any, loader: Any, epoch: int) -> None:
        for teller in (dataset, loader) if epoch % 2 else (loader, dataset):
            teller.set_epoch(epoch)

    assert epochs_in_force(both, (3, 4, 9, 8)) == [3, 4, 9, 8]
