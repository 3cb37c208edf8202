"""The fast small-image path gives the same arms as IGOverlayDataset behind a loader."""

from collections import Counter

import numpy as np
import pytest
import torch
from device_parts import ALWAYS, SIZE, N, Parts, create_parts, load_parts
from tiny_parts import ImageList, noise_image, ramp
from torchvision import transforms

from timm_igkd import IGOverlay, IGOverlayDataset
from timm_igkd.errors import InputError
from timm_igkd.overlay.blend import blend_map
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation, DeviceViews
from timm_igkd.training.batch import Batch, epoch_order
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.worker_batches import WorkerBatches


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return create_parts(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def data(parts) -> DeviceImages:
    return load_parts(parts)


def batches(
    data: DeviceImages, seed: int = 0, epoch: int = 0, batch_size: int = 4, at_once: int = 1, **settings
) -> Batch:
    """Return one epoch as one batch."""
    augmentation = DeviceAugmentation(**{"overlay": ALWAYS, "teacher_view": "clean"} | settings)
    found = list(DeviceBatches(data, augmentation, batch_size, seed, at_once).epoch(epoch))
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
    found = DeviceBatches(data, DeviceAugmentation(ALWAYS), N, seed=3)
    (batch,) = found.epoch(0)
    powers = found.views.draws(0).power
    for image, logits in zip(batch.student, batch.logits, strict=True):
        own = int(logits[0])
        expected = ALWAYS.apply(parts[0].images[own], parts[1].overlay_map(own), float(powers[own]))
        levels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert (image * 255 - levels).abs().max() <= 1.001


def test_exponents_are_spread_log_uniformly_over_their_range(data):
    views = DeviceViews(data, DeviceAugmentation(ALWAYS), seed=0)
    logs = torch.cat([views.draws(epoch).power for epoch in range(200)]).log2()
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
    loader, found = DeviceBatches(first, settings, 1, seed=1), Counter()
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
    (batch,) = DeviceBatches(data, DeviceAugmentation(ALWAYS), N, 0).epoch(0)
    assert batch.teacher is None


def test_share_of_overlaid_images_is_the_probability(data):
    views = DeviceViews(data, DeviceAugmentation(IGOverlay(0.1)), seed=0)
    share = torch.cat([views.draws(epoch).overlaid for epoch in range(500)]).double().mean()
    assert abs(share - 0.1) < 0.015


def test_overlays_leave_order_crops_and_flips_as_they_are(data):
    powers = [IGOverlay(p) for p in (0.0, 0.1, 0.9)]
    drawn = [DeviceViews(data, DeviceAugmentation(power, 4, 0.5), seed=5).draws(2) for power in powers]
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
    views = DeviceViews(data, DeviceAugmentation(IGOverlay(0.0), hflip=0.5, alternate_flip=True), seed=3)
    flipped = [views.draws(epoch).flipped for epoch in range(4)]
    assert torch.equal(flipped[1], ~flipped[0])
    assert torch.equal(flipped[2], flipped[0])
    assert torch.equal(flipped[3], flipped[1])
    assert 0 < int(flipped[0].sum()) < len(data)
    plain = DeviceViews(data, DeviceAugmentation(IGOverlay(0.0), hflip=0.5), seed=3)
    assert torch.equal(plain.draws(0).flipped, flipped[0])


def test_reflected_border_is_that_of_numpy(data):
    views = DeviceViews(data, DeviceAugmentation(IGOverlay(0.0), padding=2, padding_mode="reflect"), seed=3)
    index = torch.arange(4)
    draws = views.draws(0).at(index)
    student, _ = views.views(index, draws)
    for found, position, shift in zip(student, index, draws.shift.tolist(), strict=True):
        pixels = data.images[position].numpy() / np.float32(255)
        padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        height, width = pixels.shape[1:]
        expected = padded[:, shift[0] : shift[0] + height, shift[1] : shift[1] + width]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_unusable_padding_is_refused(data):
    side = data.images.shape[-1]
    with pytest.raises(InputError, match=f"by reflection must be below the images' side, {side}, got {side}"):
        DeviceViews(data, DeviceAugmentation(IGOverlay(0.0), padding=side, padding_mode="reflect"), seed=0)
    with pytest.raises(InputError, match="padding_mode must be one of black, reflect, got 'edge'"):
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
    loader = DeviceBatches(data, DeviceAugmentation(ALWAYS), 5, seed=0, batches_at_once=8)
    assert [len(batch.labels) for batch in loader.epoch(0)] == [5, 5]
    assert len(loader) == 2


def test_overlays_without_maps_are_refused(data):
    with pytest.raises(InputError, match="overlays need maps, got none"):
        DeviceBatches(DeviceImages(data.images, data.labels), DeviceAugmentation(ALWAYS), 4, 0)


def test_fewer_images_than_a_batch_are_refused(data):
    with pytest.raises(InputError, match=r"a step needs 64 images \(batch_size 64, processes 1\), there are 12"):
        DeviceBatches(data, DeviceAugmentation(ALWAYS), 64, 0)


def test_both_makers_of_batches_share_the_order(data):
    """One permutation per (seed, epoch), divided among the processes batch by batch."""
    dataset = IGOverlayDataset(ImageList([noise_image(0)] * N, list(range(N))), None, seed=4)
    dataset.transform = transforms.ToTensor()
    for process in range(2):
        share = {"process_index": process, "num_processes": 2}
        workers = WorkerBatches(dataset, 3, 4, torch.device("cpu"), **share)
        device = DeviceBatches(data, DeviceAugmentation(IGOverlay(0.0)), 3, 4, **share)
        order = [label for batch in workers.epoch(2) for label in batch.labels.tolist()]
        assert len(order) == N // 2
        assert [row for batch in device.epoch(2) for row in batch.logits[:, 0].tolist()] == order


def test_processes_divide_an_epoch_and_share_no_image(data):
    seen = []
    for process in range(3):
        found = DeviceBatches(
            data, DeviceAugmentation(IGOverlay(0.0)), 2, seed=1, process_index=process, num_processes=3
        )
        seen += [int(row) for batch in found.epoch(0) for row in batch.logits[:, 0]]
    assert sorted(seen) == list(range(N))


def test_maps_of_a_batch_follow_the_views(data):
    """Where image and map are one picture, the map of the batch is the view."""
    grey = np.stack([ramp(index, SIZE, SIZE) for index in range(N)])
    images = torch.from_numpy(np.repeat(grey[:, None], 3, axis=1))
    same = DeviceImages(images, torch.zeros(N, dtype=torch.int64), torch.from_numpy(grey)[:, None])
    augmentation = DeviceAugmentation(IGOverlay(0.0), padding=3, hflip=0.5, cutout=4)
    for batch in DeviceBatches(same, augmentation, 4, 0, with_maps=True).epoch(1):
        assert torch.equal(batch.maps, batch.student[:, :1])
    assert next(DeviceBatches(same, augmentation, 4, 0).epoch(1)).maps is None


@pytest.mark.parametrize("epoch", [0, 1])
def test_maps_move_as_by_hand_where_borders_reflect_and_flips_alternate(data, epoch):
    """The studies' protocol `fast`: the image and its map, padded, cut and flipped by numpy."""
    augmentation = DeviceAugmentation(IGOverlay(0.0), 2, 0.5, padding_mode="reflect", alternate_flip=True)
    found = DeviceBatches(data, augmentation, 4, 3, with_maps=True)
    draws, rows = found.views.draws(epoch), iter(epoch_order(N, 4, 3, 3, epoch))
    for batch in found.epoch(epoch):
        for image, map in zip(batch.student, batch.maps, strict=True):
            row = next(rows)
            top, left = draws.shift[row].tolist()
            for view, pixels, border in ((image, data.images, "reflect"), (map, data.maps, "constant")):
                cut = np.pad(pixels[row].numpy(), ((0, 0), (2, 2), (2, 2)), border)[:, top:, left:][:, :SIZE, :SIZE]
                by_hand = cut[:, :, ::-1] if draws.flipped[row] else cut
                np.testing.assert_array_equal((view.numpy() * 255).round(), by_hand)
    assert not draws.flipped.all()
    assert draws.flipped.any()


def test_views_are_channels_last_without_a_copy(data):
    batch = next(DeviceBatches(data, DeviceAugmentation(ALWAYS, padding=2, teacher_view="clean"), 4, 0).epoch(0))
    for view in (batch.student, batch.teacher):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert not view.is_contiguous()


def test_an_overlay_is_rounded_to_the_nearest_level(data):
    views = DeviceViews(data, DeviceAugmentation(ALWAYS), seed=0)
    index = torch.arange(N)
    draws = views.draws(0)
    exact = blend_map(data.images / 255, data.maps / 255, 0.5, draws.power.view(-1, 1, 1, 1))
    assert ((views.views(index, draws)[0] - exact) * 255).abs().max() < 0.51


def test_views_come_contiguous_where_a_model_cannot_read_channels_last(data):
    augmentation = DeviceAugmentation(ALWAYS, padding=2, teacher_view="clean")
    (found,) = DeviceBatches(data, augmentation, N, 0, memory_format=torch.contiguous_format).epoch(0)
    (expected,) = DeviceBatches(data, augmentation, N, 0).epoch(0)
    for view, same in ((found.student, expected.student), (found.teacher, expected.teacher)):
        assert view.is_contiguous()
        assert torch.equal(view, same)


def test_maps_are_0_where_the_border_is_a_reflection(data):
    white = DeviceImages(data.images, data.labels, torch.full_like(data.maps, 255))
    views = DeviceViews(white, DeviceAugmentation(IGOverlay(0.0), padding=3, padding_mode="reflect"), seed=0)
    draws = views.draws(0)._replace(shift=torch.zeros(N, 2, dtype=torch.int64))
    maps = views.maps(torch.arange(N), draws)
    assert not maps[:, :, :3].any()
    assert not maps[..., :3].any()
    assert (maps[:, :, 3:, 3:] == 1).all()


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_cutout_has_the_side_that_was_asked_for(data, side):
    areas = (batches(data, mean=(2.0,) * 3, cutout=side).student == 0).all(1).flatten(1).sum(1)
    assert areas.max() == side * side
