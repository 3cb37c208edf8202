"""What overlays are compared with: other maps in the map's place, but always for the image's own row."""

import numpy as np
import pytest
from overlay_parts import ALWAYS
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.errors import InputError
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import control_map, derangement, sobel
from timm_igkd.overlay.dataset import IGOverlayDataset

SOURCES = ("aligned", "shuffled", "permuted", "noise", "blank", "sobel")


@pytest.fixture
def dataset() -> ImageList:
    return ImageList([noise_image(seed, 16, 12) for seed in range(6)], [0] * 6)


@pytest.fixture
def store(tmp_path, dataset):
    return write_store(tmp_path, dataset, [ramp(index, 16, 12) for index in range(6)])


def drawn(store, dataset, row: int, source: str, seed: int = 0) -> np.ndarray:
    image = control_map(store, row, dataset[row][0], source, seed)
    assert image.mode == "L"
    return np.asarray(image)


@pytest.mark.parametrize("n", [2, 3, 10, 1001])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_derangement_is_a_permutation_without_a_fixed_point(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert not (order == np.arange(n)).any()


def test_derangement_depends_on_the_seed():
    assert (derangement(50, 0) == derangement(50, 0)).all()
    assert (derangement(50, 0) != derangement(50, 1)).any()


def test_derangement_of_one_map_is_an_error():
    with pytest.raises(InputError, match="needs at least 2 maps, the store has 1"):
        derangement(1, 0)


def test_aligned_is_the_images_own_map(store, dataset):
    np.testing.assert_array_equal(drawn(store, dataset, 3, "aligned"), ramp(3, 16, 12))


def test_shuffled_is_another_images_map(store, dataset):
    for row in range(6):
        np.testing.assert_array_equal(drawn(store, dataset, row, "shuffled"), ramp(int(derangement(6, 0)[row]), 16, 12))


def test_permuted_keeps_the_histogram_and_loses_the_structure(store, dataset):
    found = drawn(store, dataset, 2, "permuted")
    own = ramp(2, 16, 12)
    np.testing.assert_array_equal(np.sort(found.ravel()), np.sort(own.ravel()))
    assert abs(np.corrcoef(found.ravel(), own.ravel())[0, 1]) < 0.4


@pytest.mark.parametrize("size", [(8, 6), (31, 17)])
def test_permuted_keeps_the_histogram_of_the_map_at_the_images_size(store, size):
    """A map that is permuted first and resized then is smoother and brighter than the one that it is held against."""
    image = noise_image(0, *size)
    found = control_map(store, 2, image, "permuted", 0)
    own = Image.fromarray(ramp(2, 16, 12)).resize(size, Image.Resampling.BILINEAR)
    assert found.size == size
    assert found.histogram() == own.histogram()


@pytest.mark.parametrize("size", [(16, 12), (8, 6), (31, 17)])
@pytest.mark.parametrize("source", SOURCES)
def test_every_control_has_the_size_of_the_image(store, source, size):
    found = control_map(store, 2, noise_image(0, *size), source, 0)
    assert (found.mode, found.size) == ("L", size)


@pytest.mark.parametrize(("source", "row"), [("aligned", 2), ("shuffled", int(derangement(6, 0)[2]))])
def test_a_map_is_brought_to_the_image_as_the_overlay_brings_it(store, source, row):
    image = noise_image(0, 31, 17)
    found = ALWAYS.apply(image, control_map(store, 2, image, source, 0), 1.5)
    assert found.tobytes() == ALWAYS.apply(image, Image.fromarray(ramp(row, 16, 12)), 1.5).tobytes()


def test_noise_is_uniform_and_of_the_images_size(store, dataset):
    found = drawn(store, dataset, 2, "noise")
    assert found.shape == (12, 16)
    assert 100 < found.mean() < 155
    assert len(np.unique(found)) > 80


@pytest.mark.parametrize("source", ["permuted", "noise"])
def test_random_controls_repeat_by_seed_and_differ_by_row_and_seed(store, dataset, source):
    first = drawn(store, dataset, 2, source)
    np.testing.assert_array_equal(first, drawn(store, dataset, 2, source))
    assert (first != drawn(store, dataset, 3, source)).any()
    assert (first != drawn(store, dataset, 2, source, seed=1)).any()


def test_blank_only_darkens(store, dataset):
    blended = IGOverlay().apply(dataset[0][0], control_map(store, 0, dataset[0][0], "blank", 0), 1.5)
    assert np.abs(np.asarray(blended) - np.asarray(dataset[0][0]) / 2).max() <= 0.5


def test_sobel_is_the_images_edges():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    edges = np.asarray(sobel(Image.fromarray(pixels)))
    assert (edges[:, 3:5] == 255).all()
    assert (edges[:, :3] == 0).all()
    assert (edges[:, 5:] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (9, 5)])
def test_sobel_of_a_constant_image_is_zero(size):
    edges = sobel(Image.new("RGB", size, (9, 9, 9)))
    assert edges.size == size
    assert edges.getextrema() == (0, 0)


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_data_is_an_error_in_every_control(store, dataset, source):
    other = ImageList([noise_image(99, 16, 12)], [0], name="others")
    overlaid = IGOverlayDataset(other, store, IGOverlay(overlay_prob=1), overlay_source=source, seed=0)
    with pytest.raises(InputError, match="image 0 of 'others' has no map"):
        overlaid[0]


@pytest.mark.parametrize("source", SOURCES)
def test_every_control_overlays_the_dataset(store, dataset, source):
    overlaid = IGOverlayDataset(dataset, store, IGOverlay(overlay_prob=1), overlay_source=source, seed=0)
    image, label = overlaid[1]
    assert (image.size, label) == ((16, 12), 0)
    assert (np.asarray(image) != np.asarray(dataset[1][0])).any()


def test_unknown_control_is_refused_before_training(store, dataset):
    with pytest.raises(InputError, match=r"overlay_source must be one of .*'shufled' \(did you mean 'shuffled'\?\)"):
        IGOverlayDataset(dataset, store, overlay_source="shufled")


def test_sobel_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = noise_image(3, 9, 7)
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    expected = np.hypot(*(ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1)))
    np.testing.assert_allclose(np.asarray(sobel(image)), expected * (255 / expected.max()), atol=0.51)
