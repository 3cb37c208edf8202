"""IGDistillationTask with an explanation loss: what a step does, alone, wrapped, and in other precisions."""

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from explained_parts import BATCH, CLASSES, KINDS, SIZE, E, batch_with_maps, build, gradients, tiny
from torch import Tensor, nn

from timm_igkd.distillation.explanation import explanation_loss
from timm_igkd.distillation.trained_student import TrainedStudent
from timm_igkd.errors import InputError


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_with_maps()


# ---- a step


def test_weight_0_is_bit_for_bit_the_task_without_it(batch, monkeypatch):
    monkeypatch.setattr("timm_igkd.distillation.task.explanation_loss", None)
    found = []
    for kwargs in ({}, {"explanation_loss_weight": 0.0, "explanation_map": "grad_cam"}):
        task = build(tiny(), tiny(seed=1), **kwargs)
        assert not isinstance(task.trainable_module, TrainedStudent)
        result = task(batch["input"], batch["target"], maps=batch["maps"] if kwargs else None)
        result["loss"].backward()
        found.append((result, gradients(task.trainable_module), [*task.trainable_module.buffers()]))
    (plain, *theirs), (ours, *own) = found
    assert set(plain) == set(ours)
    assert torch.equal(plain["loss"], ours["loss"])
    assert all(
        torch.equal(a, b) for one, other in zip(theirs, own, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_with_its_term(kind, batch):
    task = build(tiny(), tiny(seed=1), explanation_loss_weight=3.0, explanation_map=kind)
    result = task(**batch)
    expected = 0.5 * result["task_loss"] + 0.5 * result["distill_loss"] + 3 * result["explanation_loss"]
    torch.testing.assert_close(result["loss"], expected)
    student_maps = TrainedStudent(tiny(), explanation=kind).train()(batch["input"], batch["target"])[2]
    torch.testing.assert_close(result["explanation_loss"], explanation_loss(student_maps, batch["maps"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050", "test_vit"])
def test_a_few_steps_bring_the_maps_together(name, kind, batch):
    torch.manual_seed(0)
    task = build(tiny(name), task_loss_weight=0.0, explanation_map=kind, **E)
    ramp = torch.linspace(0, 1, SIZE).expand(BATCH, 1, SIZE, SIZE)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        result = task(batch["input"], batch["target"], maps=ramp)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["explanation_loss"].item())
    assert losses[-1] < losses[0] - 0.01
    assert all(gradient.isfinite().all() for gradient in gradients(task.trainable_module))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_batch_norms_move_once_as_without_it(kind, batch):
    plain, explained = tiny(), tiny()
    build(plain)(batch["input"], batch["target"])
    task = build(explained, explanation_map=kind, **E)
    task(**batch)["loss"].backward()
    for (name, a), b in zip(plain.named_buffers(), explained.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert next(int(b) for name, b in explained.named_buffers() if "num_batches" in name) == 1


def test_it_works_beside_attention_transfer(batch):
    task = build(tiny(), tiny(seed=1), attention_loss_weight=0.8, explanation_map="grad_cam", **E)
    without = build(tiny(), tiny(seed=1), attention_loss_weight=0.8)(batch["input"], batch["target"])
    result = task(**batch)
    torch.testing.assert_close(result["attention_loss"], without["attention_loss"])
    torch.testing.assert_close(result["loss"], without["loss"] + result["explanation_loss"])


def test_in_eval_mode_without_maps_the_term_is_left_out_and_with_them_no_graph_is_needed(batch):
    task = build(tiny(), **E).eval()
    with torch.no_grad():
        assert "explanation_loss" not in task(batch["input"], batch["target"])
        result = task(**batch)
    assert 0 < result["explanation_loss"] < 1
    assert not result["loss"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_that_comes_out_keeps_the_graph(kind, batch):
    task = build(tiny(), tiny(seed=1), attention_loss_weight=0.8, explanation_map=kind, **E).eval()
    with torch.no_grad():
        found = [*task(**batch).values(), *task.trainable_module(batch["input"], batch["target"])]
    assert not any(value.requires_grad for value in found)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_takes_no_maps_and_says_what_does(kind, batch):
    task = build(tiny(), explanation_map=kind, **E).eval()
    with torch.inference_mode():
        assert "explanation_loss" not in task(batch["input"], batch["target"])
        with pytest.raises(InputError, match=r"which torch.inference_mode\(\) has none of; use torch.no_grad\(\)"):
            task(**batch)


def test_maps_of_zeros_leave_the_other_terms_alone(batch):
    batch["maps"].zero_()
    plain, explained = (build(tiny(), **kwargs) for kwargs in ({}, E))
    plain(batch["input"], batch["target"])["loss"].backward()
    result = explained(**batch)
    result["loss"].backward()
    assert result["explanation_loss"] == 0
    for a, b in zip(gradients(plain), gradients(explained), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_zeros_explains_nothing_and_has_a_finite_gradient(kind, batch):
    student = tiny()
    nn.init.zeros_(student.get_classifier().weight)  # type: ignore[operator]
    result = build(student, explanation_map=kind, **E)(**batch)
    result["loss"].backward()
    assert result["explanation_loss"] == 1
    assert max(float(gradient.abs().max()) for gradient in gradients(student)) < 100


# ---- precision, accumulation, averages, processes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_autocast_gives_finite_gradients_near_those_of_float32(name, kind, dtype, batch):
    found = []
    for enabled in (False, True):
        task = build(tiny(name), task_loss_weight=0.0, explanation_map=kind, **E)
        with torch.autocast("cpu", dtype, enabled=enabled):
            result = task(**batch)
        result["loss"].backward()
        found.append((result["loss"], torch.cat([g.flatten() for g in gradients(task.trainable_module)])))
    (loss, slope), (rounded_loss, rounded) = found
    assert rounded_loss.dtype == torch.float32
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.05)
    assert rounded.isfinite().all()
    assert torch.cosine_similarity(slope, rounded, dim=0) > 0.8


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_channel_that_hardly_varies_leaves_the_gradients_of_float16_right(name, batch):
    found = []
    for enabled in (False, True):
        student = tiny(name)
        with torch.no_grad():
            next(student.parameters())[0] = 0  # a dead filter before a norm
        task = build(student, task_loss_weight=0.0, **E)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            result = task(**batch)
        result["loss"].backward()
        found.append(torch.cat([gradient.flatten() for gradient in gradients(student)]))
    assert torch.cosine_similarity(*found, dim=0) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_scaler_changes_no_gradient_of_float32(kind, batch):
    plain, scaled = (build(tiny(), explanation_map=kind, **E) for _ in range(2))
    plain(**batch)["loss"].backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(scaled(**batch)["loss"]).backward()
    scaler.unscale_(torch.optim.SGD(scaled.parameters()))
    for a, b in zip(gradients(plain), gradients(scaled), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_the_next_is_whole(kind, batch):
    plain, scaled = (build(tiny(), task_loss_weight=0.0, explanation_map=kind, **E) for _ in range(2))
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-111)
    before = copy.deepcopy(list(scaled.parameters()))
    for is_skipped in (True, False):
        optimizer.zero_grad()
        scaler.scale(scaled(**batch)["loss"]).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, scaled.parameters())) == is_skipped
    plain(**batch)["loss"].backward()
    for a, b in zip(gradients(plain), gradients(scaled), strict=True):
        torch.testing.assert_close(a, b)
    assert all(buffer.isfinite().all() for buffer in scaled.buffers())


def test_accumulated_halves_are_the_whole_batch(batch):
    whole, halves = (build(tiny("test_convnext"), **E) for _ in range(2))
    whole(**batch)["loss"].backward()
    for start in (0, BATCH // 2):
        part = {name: value[start : start + BATCH // 2] for name, value in batch.items()}
        (halves(**part)["loss"] / 2).backward()
    for a, b in zip(gradients(whole), gradients(halves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("test_resnet", "input_x_gradient"), ("test_vit", "grad_cam")])
def test_the_average_of_weights_and_the_checkpoint_are_the_students(name, kind, batch):
    student = tiny(name)
    task = build(student, explanation_map=kind, **E)
    task.setup_ema(decay=0.5)
    task(**batch)["loss"].backward()
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1
    task.update_ema()
    ema = task.get_eval_model(ema=True)
    assert task.get_eval_model() is student
    assert ema is not None
    assert list(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == list(student.state_dict())
    difference = next(student.parameters()) - next(ema.parameters())
    torch.testing.assert_close(difference, torch.full_like(difference, 0.05))
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize(("name", "kind"), [("test_resnet", "input_x_gradient"), ("test_vit", "grad_cam")])
def test_distributed_it_gives_the_same_gradients(name, kind, batch, process_group):
    single = build(tiny(name), explanation_map=kind, **E)
    task = build(tiny(name), explanation_map=kind, **E).prepare_distributed()
    expected, result = single(**batch), task(**batch)
    for loss in (expected["loss"], result["loss"]):
        loss.backward()
    assert torch.equal(result["loss"], expected["loss"])
    for a, b in zip(gradients(single), gradients(task), strict=True):
        torch.testing.assert_close(a, b)


def test_a_module_prepared_by_accelerate_explains_in_bfloat16(batch, bf16_accelerator):
    task = build(tiny("test_vit"), explanation_map="grad_cam", device=bf16_accelerator.device, **E)
    task.trainable_module = bf16_accelerator.prepare(task.trainable_module)
    with bf16_accelerator.autocast():
        result = task(**batch)
    bf16_accelerator.backward(result["loss"])
    assert result["explanation_loss"].dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(task.trainable_module))


def _train_half(rank: int, folder: Path, batch: dict[str, Tensor], name: str, kind: str) -> None:
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder / 'group'}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    task = build(tiny(name), explanation_map=kind, **E).prepare_distributed()
    part = {key: value[rank * BATCH // 2 : (rank + 1) * BATCH // 2] for key, value in batch.items()}
    for _ in range(2):  # a second step finds what a first one leaves
        task.zero_grad()
        task(**part)["loss"].backward()
    torch.save(gradients(task), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("test_convnext", "input_x_gradient"), ("test_vit", "grad_cam")])
def test_two_processes_average_the_gradients_of_their_halves(name, kind, batch, tmp_path):
    whole = build(tiny(name), explanation_map=kind, **E)
    whole(**batch)["loss"].backward()
    torch.multiprocessing.spawn(_train_half, (tmp_path, batch, name, kind), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for a, b, c in zip(gradients(whole), first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)
        assert torch.equal(b, c)


# ---- what is refused


def test_training_without_maps_is_refused(batch):
    with pytest.raises(InputError, match=r"needs the teacher's maps of the views, got none; pass maps"):
        build(tiny(), **E)(batch["input"], batch["target"])


@pytest.mark.parametrize("shape", [(BATCH, 3, SIZE, SIZE), (BATCH - 1, 1, SIZE, SIZE), (BATCH, SIZE, SIZE)])
def test_maps_of_another_shape_are_refused(shape, batch):
    with pytest.raises(InputError, match="one map per image of input"):
        build(tiny(), **E)(**batch | {"maps": torch.ones(shape)})


def test_soft_targets_are_refused(batch):
    soft = torch.full((BATCH, CLASSES), 1 / CLASSES)
    with pytest.raises(InputError, match="one class per image, got the soft targets of Mixup or CutMix"):
        build(tiny(), **E)(**batch | {"target": soft})


def test_compiling_is_refused():
    with pytest.raises(InputError, match=r"torch\.compile has no second derivatives"):
        build(tiny(), **E).compile(backend="eager")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(InputError, match="explanation_loss_weight must be finite and at least 0"):
        build(tiny(), explanation_loss_weight=weight)


def test_explanations_alone_are_a_loss(batch):
    student = tiny()
    before = copy.deepcopy(student)
    assert set(build(student, task_loss_weight=0.0, **E)(**batch)) == {"loss", "output", "explanation_loss"}
    for a, b in zip(student.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_without_any_term_is_a_tensor_of_zero(batch):
    task = build(tiny(), **E, task_loss_weight=0).eval()
    loss = task(batch["input"], batch["target"])["loss"]
    assert torch.equal(loss, torch.zeros(()))
