"""The fast small-image path gives the same arms as IGOverlayDataset behind a loader."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, write_store
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_igkd import IGOverlay, IGOverlayDataset, MapStore
from timm_igkd.errors import InputError
from timm_igkd.overlay.controls import control_map
from timm_igkd.overlay.device_images import DeviceImages, StoredMaps, derange_logits, load_images, stratified_indices
from timm_igkd.overlay.device_loader import Batch, DeviceAugmentation, DeviceLoader

N, SIZE = 12, 16
ALWAYS = IGOverlay(overlay_prob=1.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Noise images with ramps as maps and logits that name their image."""
    images = ImageList([noise_image(seed, SIZE, SIZE) for seed in range(N)], [seed % 3 for seed in range(N)])
    logits = [np.full(3, seed, dtype=np.float32) for seed in range(N)]
    maps = [ramp(index, SIZE, SIZE) for index in range(N)]
    return images, write_store(tmp_path_factory.mktemp("device") / "maps", images, maps, logits=logits)


@pytest.fixture(scope="module")
def data(parts) -> DeviceImages:
    dataset, store = parts
    images = load_images(dataset)
    stored = StoredMaps(store, dataset, images)
    return DeviceImages(images.images, images.labels, stored.maps("aligned", 0), stored.logits())


def batches(
    data: DeviceImages, seed: int = 0, epoch: int = 0, batch_size: int = 4, at_once: int = 1, **settings
) -> Batch:
    """Return one epoch as one batch."""
    augmentation = DeviceAugmentation(**{"overlay": ALWAYS, "teacher_view": "clean"} | settings)
    found = list(DeviceLoader(data, augmentation, batch_size, seed, at_once).epoch(epoch))
    teachers = [batch.teacher for batch in found]
    return Batch(
        torch.cat([batch.student for batch in found]),
        None if teachers[0] is None else torch.cat(teachers),
        torch.cat([batch.labels for batch in found]),
        torch.cat([batch.logits for batch in found]),
    )


def test_images_labels_and_logits_stay_together(parts, data):
    batch = batches(data, overlay=IGOverlay(0.0))
    assert sorted(batch.logits[:, 0].tolist()) == list(range(N))
    for image, label, logits in zip(batch.student, batch.labels, batch.logits, strict=True):
        own = int(logits[0])
        assert label == parts[0].labels[own]
        assert torch.equal((image * 255).round().to(torch.uint8), data.images[own])


def test_overlay_equals_that_of_the_loader_path_to_one_level(parts, data):
    loader = DeviceLoader(data, DeviceAugmentation(ALWAYS), N, seed=3)
    (batch,) = loader.epoch(0)
    powers = loader.draws(0).power
    for image, logits in zip(batch.student, batch.logits, strict=True):
        own = int(logits[0])
        expected = ALWAYS.apply(parts[0].images[own], parts[1].overlay_map(own), float(powers[own]))
        levels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert (image * 255 - levels).abs().max() <= 1.001


def test_exponents_are_spread_log_uniformly_over_their_range(data):
    loader = DeviceLoader(data, DeviceAugmentation(ALWAYS), N, seed=0)
    logs = torch.cat([loader.draws(epoch).power for epoch in range(200)]).log2()
    counts = torch.histc(logs, bins=4, min=0, max=1)
    assert logs.min() >= 0
    assert logs.max() <= 1
    assert (counts / counts.sum()).min() > 0.22


def pairs_of_loader(parts, epochs: int) -> Counter[tuple[bytes, bytes]]:
    """Count the (student, teacher) views of image 0 that the loader path produces."""
    pipeline = [transforms.RandomCrop(SIZE, padding=1), transforms.RandomHorizontalFlip(0.5), transforms.PILToTensor()]
    dataset = IGOverlayDataset(*parts, IGOverlay(0.5, 1.0, 1.0), teacher_view="clean", seed=0)
    dataset.transform = transforms.Compose(pipeline)
    found: Counter[tuple[bytes, bytes]] = Counter()
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        student, teacher = dataset[0][0]
        found[student.numpy().tobytes(), teacher.numpy().tobytes()] += 1
    return found


def test_views_are_drawn_from_those_of_the_loader_path(parts, data):
    """36 pairs of views (9 crops, flipped or not, overlaid or not), each about equally often in both paths.

    At weight 1 the overlay is the map itself, so that no rounding hides behind a tolerance.
    """
    first = data.subset(torch.tensor([0]))
    settings = DeviceAugmentation(IGOverlay(0.5, 1.0, 1.0), padding=1, hflip=0.5, teacher_view="clean")
    loader, found = DeviceLoader(first, settings, 1, seed=1), Counter()
    for epoch in range(1500):
        (batch,) = loader.epoch(epoch)
        views = [(view[0] * 255).round().to(torch.uint8).numpy().tobytes() for view in (batch.student, batch.teacher)]
        found[tuple(views)] += 1
    expected = pairs_of_loader(parts, 1500)
    assert found.keys() == expected.keys()
    assert len(found) == 36
    for counts in (found, expected):
        assert min(counts.values()) > 1500 / 36 / 2
        assert max(counts.values()) < 1500 / 36 * 2


def test_map_follows_image_through_crop_and_flip():
    """An image that is its own map is left as it is by the overlay, so both views are equal, wherever they are cut."""
    grey = np.stack([ramp(index, SIZE, SIZE) for index in range(N)])
    images = torch.from_numpy(np.repeat(grey[:, None], 3, axis=1))
    data = DeviceImages(images, torch.zeros(N, dtype=torch.int64), torch.from_numpy(grey)[:, None], torch.zeros(N, 2))
    batch = batches(data, overlay=IGOverlay(1.0, max_power=1.0), padding=3, hflip=0.5)
    assert torch.equal(batch.student, batch.teacher)
    assert not torch.equal((batch.student[0] * 255).round(), images[0].float())


def test_teacher_sees_the_clean_image_under_the_same_crop_and_flip(data):
    overlaid = batches(data, padding=2, hflip=0.5)
    clean = batches(data, padding=2, hflip=0.5, overlay=IGOverlay(0.0))
    assert torch.equal(overlaid.teacher, clean.student)
    assert not torch.equal(overlaid.student, clean.student)


def test_same_view_makes_no_second_one(data):
    (batch,) = DeviceLoader(data, DeviceAugmentation(ALWAYS), N, 0).epoch(0)
    assert batch.teacher is None


def test_share_of_overlaid_images_is_the_probability(data):
    loader = DeviceLoader(data, DeviceAugmentation(IGOverlay(0.1)), N, seed=0)
    share = torch.cat([loader.draws(epoch).overlaid for epoch in range(500)]).double().mean()
    assert abs(share - 0.1) < 0.015


def test_overlays_leave_order_crops_and_flips_as_they_are(data):
    powers = [IGOverlay(p) for p in (0.0, 0.1, 0.9)]
    drawn = [DeviceLoader(data, DeviceAugmentation(power, 4, 0.5), N, seed=5).draws(2) for power in powers]
    for other in drawn[1:]:
        assert torch.equal(other.shift, drawn[0].shift)
        assert torch.equal(other.flipped, drawn[0].flipped)
    assert set(drawn[1].overlaid.nonzero().flatten().tolist()) <= set(drawn[2].overlaid.nonzero().flatten().tolist())


def test_batches_at_once_change_no_number(data):
    one, many = (batches(data, padding=2, hflip=0.5, batch_size=3, at_once=at_once) for at_once in (1, 8))
    assert torch.equal(one.student, many.student)
    assert torch.equal(one.teacher, many.teacher)


def test_one_seed_repeats_and_seeds_and_epochs_differ(data):
    settings = {"padding": 2, "hflip": 0.5}
    first = batches(data, seed=1, **settings).student
    assert torch.equal(first, batches(data, seed=1, **settings).student)
    assert not torch.equal(first, batches(data, seed=2, **settings).student)
    assert not torch.equal(first, batches(data, seed=1, epoch=1, **settings).student)


def test_alternating_flips_turn_every_image_in_every_later_epoch(data):
    loader = DeviceLoader(data, DeviceAugmentation(IGOverlay(0.0), hflip=0.5, alternate_flip=True), 4, seed=3)
    flipped = [loader.draws(epoch).flipped for epoch in range(4)]
    assert torch.equal(flipped[1], ~flipped[0])
    assert torch.equal(flipped[2], flipped[0])
    assert torch.equal(flipped[3], flipped[1])
    assert 0 < int(flipped[0].sum()) < len(data)
    plain = DeviceLoader(data, DeviceAugmentation(IGOverlay(0.0), hflip=0.5), 4, seed=3)
    assert torch.equal(plain.draws(0).flipped, flipped[0])


def test_reflected_border_is_that_of_numpy(data):
    loader = DeviceLoader(data, DeviceAugmentation(IGOverlay(0.0), padding=2, padding_mode="reflect"), 4, seed=3)
    index = torch.arange(4)
    draws = loader.draws(0).at(index)
    student, _ = loader.views(index, draws)
    for found, position, shift in zip(student, index, draws.shift.tolist(), strict=True):
        pixels = data.images[position].numpy() / np.float32(255)
        padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        height, width = pixels.shape[1:]
        expected = padded[:, shift[0] : shift[0] + height, shift[1] : shift[1] + width]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_unknown_padding_mode_is_refused():
    with pytest.raises(InputError, match="padding_mode must be black or reflect, got 'edge'"):
        DeviceAugmentation(IGOverlay(0.0), padding_mode="edge")


def test_views_are_normalised(data):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain, scaled = batches(data), batches(data, mean=mean, std=std)
    expected = (plain.student - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(scaled.student, expected, atol=1e-6)


def test_cutout_sets_the_same_square_of_both_views_to_the_mean(data):
    whole, cut = batches(data, padding=2), batches(data, padding=2, cutout=4)
    changed = (cut.student != whole.student).any(1)
    assert torch.equal(cut.student == 0, cut.teacher == 0) or torch.equal(
        changed, (cut.teacher != whole.teacher).any(1)
    )
    assert (cut.student.permute(0, 2, 3, 1)[changed] == 0).all()
    areas = changed.flatten(1).sum(1)
    assert areas.max() <= 16
    assert areas.max() > 8


def test_last_images_that_fill_no_batch_are_left_out(data):
    loader = DeviceLoader(data, DeviceAugmentation(ALWAYS), 5, seed=0, batches_at_once=8)
    assert [len(batch.labels) for batch in loader.epoch(0)] == [5, 5]
    assert len(loader) == 2


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


def test_overlays_without_maps_are_refused(data):
    with pytest.raises(InputError, match="overlays need maps, got none"):
        DeviceLoader(DeviceImages(data.images, data.labels), DeviceAugmentation(ALWAYS), 4, 0)


def test_fewer_images_than_a_batch_are_refused(data):
    with pytest.raises(InputError, match="a batch needs 64 images, the dataset has 12"):
        DeviceLoader(data, DeviceAugmentation(ALWAYS), 64, 0)


def test_deranged_logits_are_those_of_other_images(data):
    order = torch.arange(N).roll(1)
    assert derange_logits(data, order).logits[:, 0].tolist() == [float(row) for row in order]
    with pytest.raises(InputError, match="shuffled logits need stored logits"):
        derange_logits(DeviceImages(data.images, data.labels), order)


def test_subsets_keep_the_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    chosen = stratified_indices(labels, 0.8, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [40, 24, 16]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert not torch.equal(chosen, stratified_indices(labels, 0.8, seed=1))


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(InputError, match="fraction must be in"):
        stratified_indices(torch.zeros(3), fraction, 0)


def test_the_loader_path_shares_the_order_of_the_recipe(data):
    """One permutation per (seed, epoch), in both paths."""
    from training import EpochSampler

    sampler = EpochSampler(N, N, seed=4)
    sampler.set_epoch(2)
    dataset = ImageList([noise_image(0)] * N, list(range(N)))
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    order = [label for _, label in loader]
    assert batches(data, seed=4, epoch=2, batch_size=4).logits[:, 0].tolist() == order
