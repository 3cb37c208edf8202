"""The overlay in timm's registry: nothing of timm's changes, `tigkd` overlays in source coordinates."""

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_loader, create_transform, rand_augment_transform
from tiny_parts import ImageList, noise_image, ramp, write_store
from torchvision.transforms import v2

from timm_igkd.errors import InputError
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay import timm_ops
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.timm_ops import OP_NAME, overlay_op, take_overlay_out
from timm_igkd.random_streams import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
]

N, SIZE = 8, 32
EXACT = IGOverlay(overlay_prob=0, max_power=1)  # an image that equals its map is not changed by its overlay
INCREASING = auto_augment._RAND_INCREASING_TRANSFORMS

SNAPSHOT = """
import json
from timm.data import auto_augment as a

def names(transform):
    return [op.name for op in transform.ops], transform.num_layers, transform.choice_weights is None

def snapshot():
    sets = {name: list(getattr(a, name)) for name in dir(a) if name.startswith(("_RAND", "_AUGMIX"))}
    asked = [(name, increasing) for name in ("", "weights", "3a", "3aw", "x") for increasing in (False, True)]
    choices = [list(a.rand_augment_choices(*arguments)) for arguments in asked]
    rand = ("rand-m9", "rand-m9-inc1", "rand-m3-n4-p0.1-tweights", "rand-t3a", "rand-m9-t3aw-inc1", "rand-tnothing")
    strings = {text: names(a.rand_augment_transform(text)) for text in rand}
    policies = {
        name: [[repr(op) for op in ops] for ops in a.auto_augment_policy(name)]
        for name in ("original", "originalr", "v0", "v0r", "3a")
    }
    mixed = [repr(op) for op in a.augment_and_mix_transform("augmix-m5-w4-d2", {}).ops]
    return json.dumps([sets, choices, strings, policies, mixed])

before, ops, levels = snapshot(), dict(a.NAME_TO_OP), dict(a.LEVEL_TO_ARG)
import timm_igkd
added = [sorted(set(a.NAME_TO_OP) - set(ops)), sorted(set(a.LEVEL_TO_ARG) - set(levels))]
kept = all(a.NAME_TO_OP[k] is v for k, v in ops.items()) and all(a.LEVEL_TO_ARG[k] is v for k, v in levels.items())
print(json.dumps([snapshot() == before, added, kept]))
"""


@pytest.fixture(scope="module")
def ramps(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Images that equal their own maps."""
    images = [Image.fromarray(ramp(index, SIZE, SIZE)).convert("RGB") for index in range(N)]
    dataset = ImageList(images, [0] * N, name="ramps")
    return dataset, write_store(tmp_path_factory.mktemp("maps"), dataset, [ramp(i, SIZE, SIZE) for i in range(N)])


def pipeline(text: str, **options) -> Callable:
    return create_transform(24, is_training=True, use_prefetcher=False, auto_augment=text, **options)


def wrap(parts, text: str | None, overlay: IGOverlay = EXACT, **options) -> IGOverlayDataset:
    dataset = IGOverlayDataset(*parts, overlay, **{"seed": 0, **options})
    dataset.transform = None if text is None else pipeline(text)
    return dataset


def images_of(dataset: IGOverlayDataset, epochs: int = 6) -> torch.Tensor:
    views = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        views += [dataset[index][0] for index in range(len(dataset))]
    return torch.stack(views)


def counted(dataset: IGOverlayDataset) -> list[int]:
    """Return a list that grows by the index of each image the dataset overlays."""
    seen: list[int] = []
    overlaid = dataset.overlaid
    dataset.overlaid = lambda image, label, index, power: (seen.append(index), overlaid(image, label, index, power))[1]  # type: ignore[method-assign]
    return seen


# ---- timm without the name


@pytest.mark.slow
def test_the_import_adds_the_op_and_changes_nothing_else():
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, [[OP_NAME], [OP_NAME]], True]


def test_registering_again_changes_nothing():
    choices = auto_augment.rand_augment_choices
    timm_ops.register()
    assert auto_augment.rand_augment_choices is choices


@pytest.mark.parametrize("text", ["rand-m9-tigkd", "rand-m5-n3-p0.3-tigkd-mstd0.5", "rand-tigkd-inc0", "rand-ttigkd"])
def test_the_name_adds_the_op_to_timms_increasing_set(text):
    transform = rand_augment_transform(text)
    assert [op.name for op in transform.ops] == [*INCREASING, OP_NAME]
    assert transform.choice_weights is None
    assert OP_NAME not in INCREASING


# ---- on an IGOverlayDataset


def test_map_follows_image_with_the_name(ramps):
    with_name = wrap(ramps, "rand-m9-n8-p1-tigkd")
    without = wrap(ramps, "rand-m9-n8-p1-tigkd")
    without.overlay_prob = 0
    seen = counted(with_name)
    assert torch.equal(images_of(with_name), images_of(without))
    assert 0.2 < len(seen) / (6 * N) < 0.6  # 1 - (15 / 16) ** 8 = 0.40


def test_another_images_map_does_not_follow(ramps):
    """The law above can fail."""
    shuffled = wrap(ramps, "rand-m9-n8-p1-tigkd", overlay_source="shuffled")
    without = wrap(ramps, "rand-m9-n8-p1-tigkd")
    without.overlay_prob = 0
    assert not torch.allclose(images_of(shuffled), images_of(without), atol=0.2)


@pytest.mark.parametrize(("layers", "prob"), [(1, 0.5), (2, 0.5), (2, 1.0), (8, 0.7)])
def test_probability_is_that_of_the_string(ramps, monkeypatch, layers, prob):
    """The dataset overlays as often as timm's own RandAugment would call the op."""
    text = f"rand-m9-n{layers}-p{prob}-tigkd"
    expected = 1 - (1 - prob / 16) ** layers
    dataset = wrap(ramps, text)
    assert dataset.overlay_prob == pytest.approx(expected)
    assert np.mean([dataset.draw(index)[0] for index in range(4000)]) == pytest.approx(expected, abs=0.03)

    calls: list[bool] = []
    transform = rand_augment_transform(text)
    for op in transform.ops:
        is_overlay = op.aug_fn is overlay_op
        op.level_fn, op.aug_fn = None, lambda image, o=is_overlay, **_: (calls.append(o), image)[1]
    hits = 0
    with seeded(0):
        for _ in range(4000):
            calls.clear()
            transform(None)
            hits += any(calls)
    assert hits / 4000 == pytest.approx(expected, abs=0.03)


def test_probability_without_the_name_is_the_overlays(ramps):
    dataset = wrap(ramps, "rand-m9-tigkd", IGOverlay(overlay_prob=0.3))
    assert dataset.overlay_prob == pytest.approx(0.0615, abs=1e-4)
    for other in (None, pipeline("rand-m9-inc1"), pipeline("augmix-m5"), pipeline("original"), v2.RandomCrop(8)):
        dataset.transform = other
        assert dataset.overlay_prob == 0.3
        assert dataset.transform is other


def test_other_augmentations_stay_as_the_string_draws_them(ramps):
    """Taken out, the op leaves every other op its place in the draws."""
    given = pipeline("rand-m9-n4-tigkd")
    taken, _ = take_overlay_out(given)
    for seed in range(12):
        with seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = given(noise_image(1, 32, 32))
        with seeded(seed):
            assert torch.equal(taken(noise_image(1, 32, 32)), expected)


def test_the_assigned_pipeline_is_not_changed(ramps):
    given = pipeline("rand-m9-tigkd")
    first, second = wrap(ramps, None), wrap(ramps, None)
    first.transform = given
    second.transform = first.transform
    assert second.transform is given
    assert second.overlay_prob == first.overlay_prob > 0
    assert sum(op.aug_fn is overlay_op for op in given.transforms[2].ops) == 1


@pytest.mark.parametrize("compose", ["none", "v1", "v2", "two"])
def test_the_op_is_found_in(ramps, compose):
    rand = rand_augment_transform("rand-m9-n1-p1-tigkd")
    given = {
        "none": rand,
        "v1": pipeline("rand-m9-n1-p1-tigkd"),
        "v2": v2.Compose([v2.RandomCrop(16), rand]),
        "two": v2.Compose([rand, v2.Compose([rand])]),
    }[compose]
    expected = 1 - (15 / 16) ** 2 if compose == "two" else 1 / 16
    taken, probability = take_overlay_out(given)
    assert probability == pytest.approx(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            taken(noise_image(0, 32, 32))


@pytest.mark.parametrize("workers", [0, 2])
def test_create_loader_overlays_by_the_name(ramps, workers):
    batches = []
    for name in ("aligned", "blank"):
        torch.manual_seed(0)
        dataset = wrap(ramps, None, overlay_source=name)
        options = {"auto_augment": "rand-m9-n8-p1-tigkd", "num_workers": workers, "persistent_workers": False}
        loader = create_loader(
            dataset, (3, 24, 24), 4, is_training=True, hflip=0, device=torch.device("cpu"), **options
        )
        batches.append(torch.cat([images for images, _ in loader]))
    assert not torch.equal(*batches)


def test_both_views_with_the_name(ramps):
    dataset = wrap(ramps, "rand-m9-n8-p1-tigkd", teacher_view="clean", overlay_source="blank")
    pairs = [dataset[index][0] for index in range(N)]
    plain = wrap(ramps, "rand-m9-n8-p1-tigkd")
    plain.overlay_prob = 0
    assert any((student != teacher).any() for student, teacher in pairs)
    assert torch.equal(torch.stack([teacher for _, teacher in pairs]), images_of(plain, epochs=1))


def test_pickled_dataset_keeps_the_strings_probability(ramps):
    dataset = pickle.loads(pickle.dumps(wrap(ramps, "rand-m9-tigkd")))
    assert dataset.overlay_prob == pytest.approx(0.0615, abs=1e-4)
    assert dataset[0][0].shape == (3, 24, 24)


def test_wrapped_attributes_are_reached_and_missing_ones_named(ramps):
    dataset = wrap(ramps, None)
    assert dataset.images is ramps[0].images
    with pytest.raises(AttributeError, match="'ImageList' object has no attribute 'nothing'"):
        _ = dataset.nothing


# ---- without maps


def test_outside_a_dataset_the_op_is_the_identity_and_warns_once():
    image = noise_image(0)
    op = auto_augment.AugmentOp(OP_NAME, prob=1.0, magnitude=9)
    timm_ops._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # Python's
        for _ in range(3):
            assert op(image) is image
            with warnings.catch_warnings():  # as where an image is read
                pass
    (warning,) = told
    assert "IGOverlay changes nothing outside a timm_igkd.IGOverlayDataset" in str(warning.message)


def test_the_name_without_maps_is_refused(ramps):
    dataset = IGOverlayDataset(ramps[0], None)
    with pytest.raises(InputError, match="the transform's IGOverlay needs maps, got none"):
        dataset.transform = pipeline("rand-m9-tigkd")
    assert dataset.transform is None


def test_the_op_among_weighted_ones_is_refused(ramps):
    transform = rand_augment_transform("rand-m9", transforms={OP_NAME: 1.0, "Rotate": 3.0, "Invert": 1.0})
    with pytest.raises(InputError, match="IGOverlay in a RandAugment with weights is not supported"):
        wrap(ramps, None).transform = transform


# ---- posterize at 0 bits

POSTERIZING = ["rand-m10-n1-p1", "rand-m0-n1-p1-inc0", "rand-m10-n1-p1-tigkd", "augmix-m10-w1-d1", "v0r", "originalr"]


def policy_of(text: str) -> Callable:
    (policy,) = [
        part
        for part in pipeline(text).transforms
        if isinstance(part, auto_augment.RandAugment | auto_augment.AugMixAugment | auto_augment.AutoAugment)
    ]
    return policy


def posterizers(policy) -> list[auto_augment.AugmentOp]:
    ops = policy.ops if hasattr(policy, "ops") else [op for ops in policy.policy for op in ops]
    return [op for op in ops if op.name.startswith("Posterize")]


@pytest.mark.parametrize("text", POSTERIZING)
def test_policies_created_with_it_posterize_to_black(text):
    image = noise_image(0, 32, 32)
    with timm_ops.posterize_to_black():
        ops = posterizers(policy_of(text))
    assert ops
    for op in ops:
        op.prob, op.magnitude_std = 1.0, 0
        op.magnitude = 0 if op.name == "Posterize" else 10
        expected = np.asarray(image) if op.name == "PosterizeOriginal" else np.zeros((32, 32, 3))
        assert np.array_equal(np.asarray(op(image)), expected)
        op.magnitude = 5  # 2 bits, or 6 of the original policy's
        mask = 0xFC if op.name == "PosterizeOriginal" else 0xC0
        assert np.array_equal(np.asarray(op(image)), np.asarray(image) & mask)


def test_timms_own_posterize_is_kept_outside():
    before = dict(auto_augment.NAME_TO_OP)
    with timm_ops.posterize_to_black():
        assert before != auto_augment.NAME_TO_OP
    assert before == auto_augment.NAME_TO_OP
    assert all(op.aug_fn is auto_augment.posterize for op in posterizers(policy_of("rand-m9-inc1")))
