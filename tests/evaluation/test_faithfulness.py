"""Deletion and insertion: curves of models that sum known pixels, the order of pixels, and the record of a store."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from tiny_parts import ImageList, noise_image, provenance_of, tiny_teacher
from torch import Tensor

from timm_igkd import score_maps
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import TeacherView
from timm_igkd.errors import InputError
from timm_igkd.evaluation.faithfulness import (
    area_under,
    centre_map,
    measure_curves,
    pixel_order,
    replacement_curve,
    summarize,
)
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.card import dataset_card
from timm_igkd.maps.scores import CONTROLS, SCORE, read_score
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import save_model
from timm_igkd.records import write_record

IMAGES = ImageList([noise_image(seed) for seed in range(5)], [0, 1, 0, 1, 1])


def summing(weights: Tensor):
    """Return a classifier whose class 1 has the probability sum(weights * pixels) of the first channel."""

    def logits(images: Tensor) -> Tensor:
        share = (images[:, 0] * weights).sum((1, 2)).clamp(1e-9, 1 - 1e-9)
        return torch.stack([torch.log1p(-share), share.log()], dim=1)

    return logits


def curve(maps: Tensor, weights: Tensor, steps: int, batch_size: int = 64) -> Tensor:
    ones = torch.ones(len(maps), 3, *maps.shape[1:])
    targets = torch.ones(len(maps), dtype=torch.int64)
    return replacement_curve(summing(weights), ones, 0 * ones[:1], targets, pixel_order(maps), steps, batch_size)


WEIGHTS = torch.tensor([[0.4, 0.3], [0.2, 0.1]])


def test_curve_and_area_of_a_model_that_sums_pixels_are_exact():
    found = curve(WEIGHTS[None], WEIGHTS, steps=4)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.6, 0.3, 0.1, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(area_under(found), torch.tensor([0.375]), atol=1e-6, rtol=0)


def test_insertion_is_the_other_way_round():
    ones, order = torch.ones(1, 3, 2, 2), pixel_order(WEIGHTS[None])
    found = replacement_curve(summing(WEIGHTS), 0 * ones, ones, torch.tensor([1]), order, 4)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.4, 0.7, 0.9, 1.0]]), atol=1e-6, rtol=0)


def test_class_that_is_followed_is_the_target():
    ones = torch.ones(1, 3, 2, 2)
    found = replacement_curve(summing(WEIGHTS), ones, 0 * ones, torch.tensor([0]), pixel_order(WEIGHTS[None]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.7, 1.0]]), atol=1e-6, rtol=0)


def test_no_order_falls_faster_than_that_of_a_perfect_map():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(6, 6, generator=generator)
    weights /= weights.sum()
    others = torch.rand(20, 6, 6, generator=generator)
    found = curve(torch.cat([weights[None], others, -weights[None]]), weights, steps=9)
    assert (found[0] <= found[1:] + 1e-6).all()
    assert (found[-1] >= found[:-1] - 1e-6).all()
    assert area_under(found)[0] < area_under(found)[1:].min()


def test_pixels_go_from_the_highest_and_ties_in_reading_order():
    maps = torch.tensor([[[1.0, 3.0, 1.0], [3.0, -2.0, 1.0]]])
    assert pixel_order(maps).tolist() == [[1, 3, 0, 2, 5, 4]]
    many = pixel_order(torch.zeros(1, 50, 50))
    assert torch.equal(many, torch.arange(2500)[None])


@pytest.mark.parametrize("steps", [1, 3, 7, 36, 50])
def test_shares_of_pixels_are_equal_to_one_pixel_and_end_with_all(steps):
    found = curve(torch.rand(1, 6, 6), torch.full((6, 6), 1 / 36), steps)[0]
    shares = 1 - torch.arange(steps + 1) / steps
    assert (found - shares).abs().max() <= 0.5 / 36 + 1e-6
    assert (float(found[0]), float(found[-1])) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_batches_change_nothing(batch_size):
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(4, 4) / 16
    assert torch.equal(curve(maps, weights, 5, batch_size), curve(maps, weights, 5))


def test_centre_comes_first():
    order = pixel_order(centre_map(5, 7)[None])[0]
    assert order[0] == 2 * 7 + 3
    assert set(order[-4:].tolist()) == {0, 6, 28, 34}


# ---- stores


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher(classes=2, size=16)


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> MapStore:
    folder = tmp_path_factory.mktemp("scored") / "maps"
    return compute_maps(teacher, IMAGES, folder, options=IGOptions(n_steps=2), progress=False)


@pytest.fixture(scope="module")
def score(store, teacher):
    return score_maps(store, teacher, IMAGES, steps=4, progress=False)


def test_store_is_scored_beside_its_controls(score):
    assert [each.maps for each in score.scores] == ["own", *CONTROLS]
    assert (score.n, score.steps) == (5, 4)
    assert all(len(each.deletion_curve) == len(each.insertion_curve) == 5 for each in score.scores)


def test_all_maps_are_of_the_same_images_at_both_ends(score):
    for name in ("deletion_curve", "insertion_curve"):
        ends = np.array([[getattr(each, name)[0], getattr(each, name)[-1]] for each in score.scores])
        assert np.allclose(ends, ends[0], atol=1e-6)
    own = score.scores[0]
    assert own.deletion_curve[0] == pytest.approx(own.insertion_curve[-1], abs=1e-6)


def probabilities(teacher) -> Tensor:
    view = TeacherView(teacher)
    with torch.no_grad():
        return teacher(torch.stack([view(image) for image in IMAGES.images])).softmax(-1)


def test_first_point_is_the_probability_of_the_labels(score, teacher):
    wanted = probabilities(teacher)[torch.arange(5), torch.tensor(IMAGES.labels)].mean()
    assert score.scores[0].deletion_curve[0] == pytest.approx(float(wanted), abs=1e-5)


def test_predicted_target_follows_the_predicted_class(teacher, tmp_path):
    options = IGOptions(n_steps=1, target="predicted")
    store = compute_maps(teacher, IMAGES, tmp_path, options=options, progress=False)
    found = score_maps(store, teacher, IMAGES, steps=1, progress=False)
    wanted = probabilities(teacher).amax(1).mean()
    assert found.scores[0].deletion_curve[0] == pytest.approx(float(wanted), abs=1e-5)


def test_gaps_are_paired_by_image(store, teacher):
    curves = measure_curves({"own": store}, teacher, IMAGES, steps=3, progress=False)
    found = summarize(curves, "own", store.provenance, 0).scores[1]
    gaps = (area_under(curves["own"][0].double()) - area_under(curves["random"][0].double())).numpy()
    half = 2.776445 * gaps.std(ddof=1) / np.sqrt(5)  # t with 4 degrees of freedom
    assert found.maps == "random"
    assert (found.deletion_gap.mean, found.deletion_gap.low) == pytest.approx((gaps.mean(), gaps.mean() - half))


def test_limit_spreads_the_images_evenly(store, teacher):
    every = measure_curves({"own": store}, teacher, IMAGES, steps=2, progress=False)["own"][0]
    some = measure_curves({"own": store}, teacher, IMAGES, limit=2, steps=2, progress=False)["own"][0]
    torch.testing.assert_close(some, every[[0, 2]])


def test_map_smaller_than_the_input_is_enlarged(teacher, tmp_path):
    store = compute_maps(teacher, IMAGES, tmp_path, options=IGOptions(n_steps=1), map_size=4, progress=False)
    assert score_maps(store, teacher, IMAGES, steps=2, progress=False).n == 5


def test_wrapped_teacher_of_one_channel_is_scored(tmp_path):
    torch.manual_seed(0)
    grey = timm.create_model(
        "test_resnet", num_classes=2, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 16, 16)}
    )
    wrapped = torch.nn.DataParallel(grey)
    store = compute_maps(wrapped, IMAGES, tmp_path, options=IGOptions(method="saliency"), progress=False)
    assert score_maps(store, wrapped, IMAGES, steps=2, progress=False).n == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 1}, "images to score must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 10**20}, "steps must be in"),
    ],
)
def test_too_few_images_or_steps_are_refused(arguments, message, store, teacher):
    with pytest.raises(InputError, match=message):
        score_maps(store, teacher, IMAGES, **arguments)


def test_another_teacher_is_refused(store):
    with pytest.raises(InputError, match="made by another teacher than the one given: weights differ"):
        score_maps(store, tiny_teacher(size=16, seed=3), IMAGES)


def test_images_without_maps_are_refused(store, teacher):
    with pytest.raises(InputError, match="has no map"):
        score_maps(store, teacher, ImageList([noise_image(90), noise_image(91)], [0, 1]), progress=False)


# ---- the record, the card and the command


def test_record_comes_back(score, store, tmp_path):
    write_record(tmp_path / SCORE, score)
    assert read_score(tmp_path, store.provenance) == score


@pytest.mark.parametrize("change", [{"n_steps": 3}, {"method": "saliency"}])
def test_score_of_other_maps_is_not_read_as_this_stores(change, score, store, tmp_path):
    write_record(tmp_path / SCORE, score)
    assert read_score(tmp_path, replace(store.provenance, options=IGOptions(**change))) is None
    assert read_score(tmp_path, replace(store.provenance, keys_hash="1" * 32)) is None


def test_damaged_score_is_refused_in_one_line(score, store, tmp_path):
    write_record(tmp_path / SCORE, score)
    content = json.loads((tmp_path / SCORE).read_text())
    content["scores"][1]["deletion"]["mean"] = "low"
    (tmp_path / SCORE).write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"scores\[1\]: deletion: mean must be a finite number.*timm-igkd score"
    ) as error:
        read_score(tmp_path, store.provenance)
    assert "\n" not in str(error.value)


def test_card_tells_the_score_and_without_one_is_silent(score, store):
    card = dataset_card(store.provenance, score=score)
    assert "## How faithful the maps are" in card
    assert "mean and 95 % interval over 5 images" in card
    assert "| Random pixels | " in card
    assert "faithful" not in dataset_card(provenance_of(3))


def test_command_writes_the_score_and_renews_the_card(command, tiny_images, tmp_path):
    save_model(tiny_teacher(classes=2, size=16), tmp_path / "teacher")
    data = ["--dataset", tiny_images(n=4), "--split", "train", "--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    assert command("maps", *data, "--out", tmp_path / "maps", "--method", "saliency").code == 0
    flags = ["--maps", tmp_path / "maps", *data, "--limit", 3, "--steps", 3]
    found = command("score", *flags, "--out", tmp_path / "maps" / SCORE)
    assert (found.code, "Saliency" in found.output) == (0, True)
    assert read_score(tmp_path / "maps", MapStore(tmp_path / "maps").provenance).n == 3
    assert "## How faithful the maps are" in (tmp_path / "maps" / "README.md").read_text()
    card = (tmp_path / "maps" / "README.md").read_bytes()
    assert command("maps", *data, "--out", tmp_path / "maps", "--method", "saliency").code == 0
    assert (tmp_path / "maps" / "README.md").read_bytes() == card
