"""The dataset wrapper finds rows by content and keeps the contract of timm's data sets."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from overlay_parts import ALWAYS, EXACT, NEVER, N, error_of_worker, images_of, pipeline, wrap
from PIL import Image
from timm.data import create_naflex_loader, create_transform
from timm.data.loader import fast_collate
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store
from torch.utils.data import ConcatDataset, DataLoader, Subset

from timm_igkd import IGOptions, compute_maps
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.device_images import StoredMaps, load_images

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python from 3.12 on

# ---- rows are found by content


@pytest.mark.parametrize("order", [[3, 1, 4], list(range(N))[::-1]], ids=["subset", "reversed"])
def test_subset_finds_its_rows(ramps, order):
    dataset, store = ramps
    part = wrap((Subset(dataset, order), store), EXACT)
    assert torch.equal(images_of(part), images_of(wrap(ramps, NEVER))[order])


def test_random_split_and_concatenation_find_their_rows(ramps):
    dataset, store = ramps
    parts = torch.utils.data.random_split(dataset, [5, N - 5])
    joined = wrap((ConcatDataset(parts), store), EXACT)
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


def test_transform_of_any_part_is_refused_by_the_name_of_the_part(noisy):
    later = ImageList(noisy[0].images, noisy[0].labels, name="later")
    later.transform = torchvision.transforms.ToTensor()
    joined = ConcatDataset([noisy[0], Subset(ConcatDataset([noisy[0], later]), [0])])
    with pytest.raises(InputError, match="'later' has a transform already"):
        IGOverlayDataset(joined, noisy[1])


WITHIN = {
    "itself": lambda overlaid: overlaid,
    "a Subset": lambda overlaid: Subset(overlaid, [1]),
    "a ConcatDataset": lambda overlaid: ConcatDataset([overlaid.dataset, overlaid]),
    "a Subset of a ConcatDataset of a Subset": lambda overlaid: Subset(ConcatDataset([Subset(overlaid, [0])]), [0]),
}


@pytest.mark.parametrize("case", WITHIN)
@pytest.mark.parametrize("overlay", [ALWAYS, NEVER])
def test_dataset_that_is_overlaid_already_is_refused_when_it_is_made(noisy, case, overlay):
    overlaid = IGOverlayDataset(*noisy, overlay)
    with pytest.raises(InputError, match=r"'noise' is overlaid already, .* without `timm-igkd run`"):
        IGOverlayDataset(WITHIN[case](overlaid), noisy[1])
    overlaid.transform = torchvision.transforms.ToTensor()
    with pytest.raises(InputError, match="overlaid already"):
        IGOverlayDataset(WITHIN[case](overlaid), None)
    with pytest.raises(InputError, match="overlaid already"):
        load_images(WITHIN[case](overlaid))


def test_parts_of_an_overlaid_dataset_are_what_a_loader_takes(noisy):
    overlaid = IGOverlayDataset(*noisy, ALWAYS)
    assert Subset(overlaid, [1])[0][1] == 1
    assert len(IGOverlayDataset(overlaid.dataset, noisy[1])) == N


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
    again = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(again[index][0][view], dataset[index][0][view]) for index in range(N) for view in (0, 1))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_workers_of_a_copied_dataset_see_the_epoch(noisy, again):
    dataset = again(wrap(noisy, IGOverlay(overlay_prob=0.5), pipeline("RandAugment"), seed=3))
    context = multiprocessing.get_context("fork")
    loader = DataLoader(dataset, batch_size=N, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert torch.equal(next(iter(loader))[0], images_of(dataset))


def test_forked_workers_toss_coins_of_their_own_after_an_item_was_read(noisy):
    dataset = wrap(noisy, IGOverlay(overlay_prob=0.5), torchvision.transforms.ToTensor(), seed=None)
    torch.manual_seed(0)
    dataset[0]
    context = multiprocessing.get_context("fork")
    loader = DataLoader(dataset, batch_size=N, num_workers=1, multiprocessing_context=context)
    epochs = [next(iter(loader))[0] for _ in range(4)]
    assert not all(torch.equal(epochs[0], other) for other in epochs[1:])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["1", "2", "10"],
            "class '2' is label 1 of .* and number 2 in the logits of .*; store its own: timm-igkd",
        ),
        (["2", "10"], "class '2' is label 0 of .* and number 2 in the logits"),
        (["0", "1", "10", "2"], "class '1' is label 1 of .* and number 0 in the logits"),
    ],
)
def test_stored_logits_in_another_order_of_the_classes_are_refused(names, message, tmp_path):
    classes = ("1", "10", "2")
    images = ImageList([noise_image(seed, 24, 24) for seed in range(3)], [0, 1, 2])
    images.classes = classes
    store = compute_maps(tiny_teacher(classes=3), images, tmp_path, options=IGOptions(method="none"), logits=True)
    assert len(IGOverlayDataset(images, store, NEVER, with_logits=True)[0]) == 3
    images.classes = ("one", "ten", "two")  # the same classes by other names, for all that can be known
    assert len(IGOverlayDataset(images, store, NEVER, with_logits=True)[0]) == 3
    images.classes = np.array(names)
    with pytest.raises(InputError, match=message):
        IGOverlayDataset(images, store, NEVER, with_logits=True)
    stored = StoredMaps(store, images, load_images(images))
    with pytest.raises(InputError, match=message):
        stored.logits()


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


@pytest.mark.parametrize("view", ["same", "clean"])
def test_naflex_loader_that_would_leave_out_images_is_refused(noisy, view):
    dataset = IGOverlayDataset(*noisy, IGOverlay(overlay_prob=1.0), teacher_view=view)
    with pytest.raises(InputError, match=r"NaFlex loader leaves out every image whose item raises.*create_loader"):
        create_naflex_loader(dataset, patch_size=8, train_seq_lens=(9,), batch_size=2, is_training=True, num_workers=0)
    assert len(dataset) == N


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"input_img_mode": "L"}, "overlays need RGB images, .* has input_img_mode 'L'"),
        ({"additional_features": ["size"]}, r"adds size to its items \(additional_features\)"),
    ],
)
def test_items_other_than_colour_image_and_label_are_refused(tiny_images, options, told):
    folder = str(tiny_images("folder"))
    dataset = timm.data.create_dataset("", root=folder, split="train", **options)
    plain = timm.data.create_dataset("", root=folder, split="train")
    for given in (dataset, Subset(dataset, [0]), ConcatDataset([plain, dataset])):
        with pytest.raises(InputError, match=told):
            IGOverlayDataset(given, None)
    assert IGOverlayDataset(ConcatDataset([plain, plain]), None)[0]
