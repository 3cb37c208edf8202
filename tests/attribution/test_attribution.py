"""Integrated gradients: laws that hold for any correct engine, and a teacher that is left as it was."""

import threading

import pytest
import torch
from attribution_parts import FAMILIES, Linear, attribute, images_in
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import Tensor

from timm_igkd.attribution.chunk_pool import ChunkPool
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import IGOptions, TeacherView, selected_output
from timm_igkd.maps.build import compute_maps
from timm_igkd.models.loading import weights_hash


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("kind", ["mean", "black", "blur", "noise"])
@pytest.mark.parametrize("n_steps", [1, 7])
def test_linear_model_is_attributed_by_weight_times_difference(engine, kind, n_steps):
    model = Linear()
    inputs, targets = images_in(model, 5), torch.tensor([0, 1, 2, 0, 1])
    baselines = TeacherView(model).baseline(inputs, kind, list(range(5)))
    found = attribute(engine, model, inputs, baselines, targets, n_steps=n_steps)
    weights = model.head.weight.detach()[targets].view(5, 3, 6, 6)
    torch.testing.assert_close(found.values, weights * (inputs - baselines), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.convergence_delta, torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", FAMILIES)
def test_delta_is_the_gap_to_completeness(engine, output, name):
    model = tiny_teacher(name, classes=4)
    inputs, targets = images_in(model, 4), torch.arange(4)
    baselines = TeacherView(model).baseline(inputs, "black", [])
    found = attribute(engine, model, inputs, baselines, targets, n_steps=3, output=output)
    with torch.no_grad():
        end = selected_output(model(inputs), targets, output)
        start = selected_output(model(baselines.expand_as(inputs)), targets, output)
    gap = found.values.sum((1, 2, 3)) - (end - start)
    torch.testing.assert_close(found.convergence_delta, gap, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_more_steps_are_more_complete(engine):
    model = tiny_teacher("test_vit", classes=4)
    inputs, targets = images_in(model, 4), torch.arange(4)
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    few, many = (
        attribute(engine, model, inputs, baselines, targets, n_steps=n).convergence_delta.abs().max() for n in (2, 30)
    )
    assert many < few / 10


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_do_not_change_the_result(chunk_size):
    model = tiny_teacher("test_convnext", classes=4)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "blur", [])
    whole = attribute("fast", model, inputs, baselines, targets, chunk_size=7, n_steps=5)
    found = attribute("fast", model, inputs, baselines, targets, chunk_size=chunk_size, n_steps=5)
    torch.testing.assert_close(found.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_steps", [6, "auto"])
@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv2_050", "test_vit"])
def test_workers_change_no_bit(name, n_steps):
    model = tiny_teacher(name, classes=4, size=48)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    found = []
    for workers in (1, 2, 3):
        engine = FastEngine(model, IGOptions(n_steps=n_steps), 4, (3, 48, 48), workers=workers)
        found.append(engine.attribute(inputs, baselines, targets, engine.forward(inputs)))
    for other in found[1:]:
        assert torch.equal(other.values, found[0].values)
        assert torch.equal(other.logits, found[0].logits)
        assert torch.equal(other.n_steps, found[0].n_steps)


def test_chunks_in_flight_are_bounded_whatever_their_number():
    started, lock = [0], threading.Lock()

    def compute(part: slice) -> Tensor:
        with lock:
            started[0] += 1
        return torch.tensor(part.start)

    pool, taken = ChunkPool(2), 0
    for part, result in pool.map(compute, (slice(start, start + 1) for start in range(100))):
        assert int(result) == part.start == taken
        taken += 1
        assert started[0] <= taken + 2 * pool.workers
    assert taken == 100


def test_an_image_does_not_depend_on_its_batch():
    model = tiny_teacher("test_resnet", classes=4)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    together = attribute("fast", model, inputs, baselines, targets, n_steps=5)
    alone = attribute("fast", model, inputs[3:4], baselines, targets[3:4], n_steps=5)
    torch.testing.assert_close(alone.values[0], together.values[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_steps_and_logits_are_returned(engine):
    model = tiny_teacher(classes=4)
    inputs = images_in(model, 3)
    found = attribute(engine, model, inputs, torch.zeros_like(inputs[:1]), torch.zeros(3, dtype=torch.int64), n_steps=5)
    assert found.n_steps.tolist() == [5, 5, 5]
    assert found.converged.all()
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(inputs))


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("training", [True, False])
def test_teachers_weights_gradients_and_mode_do_not_change(tmp_path, engine, training):
    model = tiny_teacher().train(training)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before, flags = weights_hash(model), [parameter.requires_grad for parameter in model.parameters()]
    dataset = ImageList([noise_image(0, 32, 32), noise_image(1, 32, 32)], [0, 1])
    compute_maps(model, dataset, tmp_path, options=IGOptions(n_steps=2), engine=engine, progress=False)
    assert weights_hash(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training


def test_a_teacher_in_training_mode_gives_the_maps_of_eval_mode(tmp_path):
    dataset = ImageList([noise_image(0, 32, 32), noise_image(1, 32, 32)], [0, 1])
    options = IGOptions(n_steps=2)
    stores = [
        compute_maps(tiny_teacher().train(mode), dataset, tmp_path / str(mode), options=options, progress=False)
        for mode in (True, False)
    ]
    assert stores[0].rows["row_hash"][:] == stores[1].rows["row_hash"][:]
