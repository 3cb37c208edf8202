"""Which output is explained, how channels become one map, and what is refused."""

import numpy as np
import pytest
import torch
from attribution_parts import Linear, attribute, images_in
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.ig_options import check_used
from timm_igkd.attribution.options import CaptumEngine, IGOptions, TeacherView, reduce_channels
from timm_igkd.errors import InputError, RunError
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.row_format import quantize


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_probability_differs_from_logit_and_sums_to_the_change_of_the_probability(engine):
    model = tiny_teacher("test_vit", classes=3)
    inputs, targets = images_in(model, 2), torch.tensor([1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    found = attribute(engine, model, inputs, baselines, targets, n_steps=40, output="probability")
    with torch.no_grad():
        change = model(inputs).softmax(-1) - model(baselines).softmax(-1)
    torch.testing.assert_close(
        found.values.sum((1, 2, 3)), change.gather(1, targets[:, None])[:, 0], atol=1e-3, rtol=1e-2
    )


def test_reductions():
    values = torch.tensor([1.0, -3.0, 0.5]).view(1, 3, 1, 1)
    assert reduce_channels(values, "abs_sum").item() == 4.5
    assert reduce_channels(values, "sum").item() == -1.5
    assert reduce_channels(values, "positive").item() == 0
    assert reduce_channels(-values, "positive").item() == 1.5


def test_target_changes_the_map():
    model, inputs = Linear(), images_in(Linear(), 1)
    maps = [attribute("fast", model, inputs, inputs * 0, torch.tensor([target]), n_steps=2).values for target in (0, 1)]
    assert not torch.allclose(*maps)


def test_predicted_target_is_the_teachers_class_not_the_label(tmp_path):
    model = Linear()
    dataset = ImageList([noise_image(seed, 6, 6) for seed in range(4)], [0, 1, 2, 0])
    inputs = torch.stack([TeacherView(model)(image) for image in dataset.images])
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    assert predicted.tolist() != dataset.labels
    store = compute_maps(model, dataset, tmp_path, options=IGOptions(n_steps=1, target="predicted"), progress=False)
    expected = reduce_channels(model.head.weight.detach()[predicted].view(4, 3, 6, 6) * inputs, "abs_sum")
    found = torch.from_numpy(np.stack([store.float_map(row) for row in range(4)]))
    assert ((found - expected).abs().amax((1, 2)) <= expected.amax((1, 2)) / 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "blak"}, r"baseline must be one of .*'blak' \(did you mean 'black'\?\)"),
        ({"target": "labels"}, "target must be one of"),
        ({"output": "logits"}, "output must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"n_steps": 2.5}, "n_steps must be a whole number or 'auto'"),
        ({"n_steps": "many"}, "n_steps must be a whole number or 'auto'"),
        ({"n_steps": True}, "n_steps must be"),
        ({"max_steps": 1}, "max_steps must be"),
        ({"max_steps": 9.5}, "max_steps must be a whole number, got 9.5"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
    ],
)
def test_option_out_of_range_is_named(options, message):
    with pytest.raises(InputError, match=message):
        IGOptions(**options)


def test_numbers_of_numpy_become_pythons():
    options = IGOptions(n_steps=np.int64(4), max_steps=np.int32(9), tolerance=np.float32(0.5))
    assert options == IGOptions(n_steps=4, max_steps=9, tolerance=0.5)
    assert [type(value) for value in (options.n_steps, options.max_steps, options.tolerance)] == [int, int, float]


@pytest.mark.parametrize("given", [{"tolerance": 0.5}, {"max_steps": 9, "n_steps": 50}])
def test_option_of_automatic_steps_is_refused_beside_fixed_ones(given):
    with pytest.raises(InputError, match=r"^(tolerance|max_steps) is of n_steps 'auto', these are 50; leave it"):
        check_used("ig", given)
    check_used("ig", given | {"n_steps": "auto"})


def test_captum_takes_no_automatic_steps():
    with pytest.raises(InputError, match="'auto' needs engine 'fast'"):
        CaptumEngine(Linear(), IGOptions(n_steps="auto"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_map_that_is_not_finite_is_a_run_error_with_the_images_name(bad):
    values = np.ones((4, 4), np.float32)
    values[1, 2] = bad
    with pytest.raises(RunError, match="the attribution of image 3 is not finite"):
        quantize(values, False, "image 3")


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_teacher_with_nan_weights_is_a_run_error_before_a_shard_is_written(tmp_path, engine):
    model = Linear()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite; check"):
        compute_maps(model, ImageList([noise_image(0)], [0]), tmp_path / "maps", engine=engine, progress=False)
    assert not list((tmp_path / "maps").rglob("*.parquet"))
    assert not (tmp_path / "maps" / "provenance.json").exists()
