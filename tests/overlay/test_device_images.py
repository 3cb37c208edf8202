"""A data set in memory: images, their own maps and logits, or an error that names the image."""

import numpy as np
import pytest
import torch
from device_parts import SIZE, N, Parts, create_parts, load_parts
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.errors import InputError
from timm_igkd.overlay.controls import control_map
from timm_igkd.overlay.device_images import DeviceImages, StoredMaps, derange_logits, load_images


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return create_parts(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def data(parts) -> DeviceImages:
    return load_parts(parts)


@pytest.mark.parametrize("source", ["aligned", "shuffled", "permuted", "noise", "blank", "sobel"])
def test_stored_maps_equal_those_of_the_loader_path(parts, source):
    dataset, store = parts
    found = StoredMaps(store, dataset, load_images(dataset)).maps(source, seed=7)
    for index, image in enumerate(dataset.images):
        assert np.array_equal(found[index, 0], np.asarray(control_map(store, index, image, source, 7)))


def test_smaller_stored_maps_are_enlarged_as_the_overlay_does(parts, tmp_path):
    small = [ramp(index, 8, 8) for index in range(N)]
    store = write_store(tmp_path / "small", parts[0], small)
    found = StoredMaps(store, parts[0], load_images(parts[0])).maps("aligned", 0)
    expected = Image.fromarray(small[3]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert np.array_equal(found[3, 0], np.asarray(expected))


def test_maps_of_a_shuffled_dataset_are_found_by_content(parts):
    dataset, store = parts
    backwards = ImageList(dataset.images[::-1], dataset.labels[::-1])
    stored = StoredMaps(store, backwards, load_images(backwards))
    assert np.array_equal(stored.maps("aligned", 0)[0, 0], ramp(N - 1, SIZE, SIZE))
    assert stored.logits()[0, 0] == N - 1


def test_maps_of_other_images_are_refused(parts):
    dataset = ImageList([noise_image(99, SIZE, SIZE)], [0])
    with pytest.raises(InputError, match="image 0 of 'list' has no map"):
        StoredMaps(parts[1], dataset, load_images(dataset))


def test_images_of_several_sizes_are_refused():
    dataset = ImageList([noise_image(0, 8, 8), noise_image(1, 9, 8)], [0, 0])
    with pytest.raises(InputError, match=r"image 1 of 'list' is 9x8, the first image is 8x8; .* IGOverlayDataset"):
        load_images(dataset)


def test_an_empty_dataset_is_refused():
    with pytest.raises(InputError, match="'list' has no images"):
        load_images(ImageList([], []))


def test_deranged_logits_are_those_of_other_images(data):
    order = torch.arange(N).roll(1)
    assert derange_logits(data, order).logits[:, 0].tolist() == [float(row) for row in order]
    with pytest.raises(InputError, match="shuffled logits need stored logits"):
        derange_logits(DeviceImages(data.images, data.labels), order)
