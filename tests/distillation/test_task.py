"""IGDistillationTask: its loss, its teacher and the options that it refuses."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from task_parts import AT, BATCH, CLASSES, Plain, build, spied, tiny
from torch import nn

from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy
from timm_igkd.distillation.live_teacher import LiveTeacher
from timm_igkd.distillation.losses import attention_transfer, kd_dkd, kd_kl
from timm_igkd.errors import InputError, InputTypeError

# ---- the loss


def test_defaults_are_the_papers():
    task = build(teacher=tiny(seed=1))
    assert (task.loss_type, task.distill_loss_weight, task.task_loss_weight) == ("kl", 0.01, 0.99)
    assert (task.temperature, task.attention_loss_weight) == (2.5, 0)


@pytest.mark.parametrize("teacher", [None, tiny(seed=1)])
def test_weight_0_is_plain_cross_entropy_and_calls_no_teacher(teacher, batch):
    input, target = batch
    student = tiny()
    plain = F.cross_entropy(copy.deepcopy(student).train()(input), target)
    task = build(student, teacher, distill_loss_weight=0).train()
    seen = spied(task) if teacher else []
    result = task(input, target)
    assert torch.equal(result["loss"], plain)
    assert set(result) == {"loss", "output", "task_loss"}
    assert not seen


def test_loss_is_the_weighted_sum_of_its_terms(batch):
    student, teacher = tiny(), tiny("test_convnext", seed=1)
    task = build(student, teacher, distill_loss_weight=0.3, task_loss_weight=0.5, temperature=4, **AT).eval()
    result = task(*batch)
    torch.testing.assert_close(
        result["loss"],
        0.5 * result["task_loss"] + 0.3 * result["distill_loss"] + 0.8 * result["attention_loss"],
    )
    torch.testing.assert_close(result["output"], student.eval()(batch[0]))
    torch.testing.assert_close(result["distill_loss"], kd_kl(student(batch[0]), teacher(batch[0]), 4))
    (ours,), (theirs,) = (
        model.forward_intermediates(batch[0], indices=[2], intermediates_only=True) for model in (student, teacher)
    )
    torch.testing.assert_close(result["attention_loss"], attention_transfer(ours, theirs))


def test_weight_0_of_the_task_loss_is_pure_distillation(batch):
    result = build(teacher=tiny(seed=1), distill_loss_weight=2, task_loss_weight=0)(*batch)
    assert set(result) == {"loss", "output", "distill_loss", "kd_loss"}
    torch.testing.assert_close(result["loss"], 2 * result["distill_loss"])


def test_task_loss_weight_defaults_to_the_complement():
    assert build(teacher=tiny(seed=1), distill_loss_weight=0.25).task_loss_weight == 0.75


def test_equal_student_and_teacher_distil_to_0(batch):
    student = tiny().eval()
    result = build(student, copy.deepcopy(student), **AT).eval()(*batch)
    assert result["distill_loss"].item() == pytest.approx(0, abs=1e-6)
    assert result["attention_loss"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["kl", "dkd", "dist", "standardized", "mse"])
def test_every_loss_type_trains_the_student(loss_type, batch):
    student = tiny()
    result = build(student, tiny(seed=1), loss_type=loss_type, distill_loss_weight=1, task_loss_weight=0)(*batch)
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_dkd_takes_its_weights(batch):
    student, teacher = tiny().eval(), tiny(seed=1)
    task = build(student, teacher, loss_type="dkd", dkd_alpha=2, dkd_beta=3).eval()
    expected = kd_dkd(student(batch[0]), teacher(batch[0]), 2.5, batch[1], alpha=2, beta=3)
    torch.testing.assert_close(task(*batch)["distill_loss"], expected)


def test_soft_targets_of_mixup_work_with_a_live_teacher(batch):
    soft = F.one_hot(batch[1], CLASSES) * 0.7 + 0.03
    result = build(teacher=tiny(seed=1))(batch[0], soft)
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(result["output"], soft))


@pytest.mark.parametrize("begin", [0.01, 0.0])
def test_teacher_class_indices_select_the_students_classes(begin, batch):
    indices = [19, 3, 5, 7, 0, 2, 4, 6, 8, 10]
    student, teacher = tiny().eval(), tiny(seed=1, classes=20)
    task = build(student, teacher, teacher_class_indices=indices, distill_loss_weight=begin).eval()
    task.distill_loss_weight = 0.5  # a schedule's, also from 0
    expected = kd_kl(student(batch[0]), teacher(batch[0])[:, indices], 2.5)
    torch.testing.assert_close(task(*batch)["distill_loss"], expected)


# ---- the teacher


def test_teacher_does_not_move_in_a_step(batch):
    teacher = tiny(seed=1).train()
    task = build(tiny(), teacher, **AT).train()
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD((p for p in task.parameters() if p.requires_grad), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        task.train()
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_student_does_move_in_a_step(batch):
    student = tiny()
    before = copy.deepcopy(student.state_dict())
    task = build(student, tiny(seed=1), **AT).train()
    task(*batch)["loss"].backward()
    torch.optim.SGD(task.trainable_module.parameters(), lr=1.0).step()
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "conv1.0.weight" in moved
    assert "bn1.running_mean" in moved


def test_teacher_of_another_normalisation_sees_the_same_pixels():
    pixels = torch.rand(BATCH, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    student = tiny(cfg={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    teacher = tiny(cfg={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    task = build(student, teacher)
    seen = spied(task)
    task((pixels - mean) / std, torch.arange(BATCH))
    torch.testing.assert_close(seen[0], pixels)


def test_models_that_differ_in_normalisation_alone_give_equal_logits(batch):
    """A teacher that folds another mean and std into its first layer is the same function of the pixels."""
    student = tiny(cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3}).eval()
    teacher = tiny(cfg={"mean": (0.5,) * 3, "std": (0.25,) * 3}).eval()
    with torch.no_grad():
        teacher.conv1[0].weight /= 2  # its input is twice as large
    result = build(student, teacher, loss_type="mse").eval()(*batch)
    assert result["distill_loss"].item() == pytest.approx(0, abs=1e-9)


def test_no_gradient_flows_through_the_teacher(batch):
    live = LiveTeacher(tiny(seed=1), tiny(), attention_index=2)
    logits, features = live(batch[0].requires_grad_(), features=True)
    assert not logits.requires_grad
    assert not features.requires_grad


def test_equal_normalisation_and_size_leave_the_input_alone(batch):
    task = build(teacher=tiny(seed=1))
    seen = spied(task)
    task(*batch)
    assert torch.equal(seen[0], batch[0])


@pytest.mark.parametrize(
    ("teacher", "kwargs", "expected"),
    [
        (tiny(seed=1, size=48), {}, (48, 48)),
        (tiny("test_vit", size=64), {}, (64, 64)),  # its pretrained_cfg may say otherwise: the model knows
        (timm.create_model("mixer_s32_224", img_size=64, num_classes=CLASSES), {}, (64, 64)),
        (tiny(seed=1, size=48), {"teacher_input_size": (32, 32)}, (32, 32)),
    ],
)
def test_teacher_gets_its_own_input_size(teacher, kwargs, expected, batch):
    teacher.pretrained_cfg["input_size"] = (3, 48, 48)
    task = build(teacher=teacher, **kwargs)
    seen = spied(task)
    task(*batch)
    assert seen[0].shape[-2:] == expected


def test_teacher_runs_in_its_own_precision(batch):
    task = build(teacher=tiny(seed=1).bfloat16())
    seen = spied(task)
    assert task(*batch)["distill_loss"].dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16


def test_attention_alone_needs_no_teacher_head(batch):
    teacher = tiny(seed=1, classes=7)
    expected = build(teacher=copy.deepcopy(teacher), distill_loss_weight=0, **AT).eval()(*batch)["attention_loss"]
    teacher.fc = None
    live = LiveTeacher(teacher, tiny(), attention_index=2)
    logits, features = live(batch[0], logits=False, features=True)
    assert logits is None
    (ours,) = tiny().eval().forward_intermediates(batch[0], indices=[2], intermediates_only=True)
    torch.testing.assert_close(attention_transfer(ours, features), expected)


# ---- options


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_type": "standardised"}, r"loss_type must be one of kl, dkd, .*\(did you mean 'standardized'\?\)"),
        ({"teacher_view": "cleen"}, r"teacher_view must be one of same, clean, .*\(did you mean 'clean'\?\)"),
        ({"distill_loss_weight": -0.1}, "distill_loss_weight must be finite and at least 0, got -0.1"),
        ({"distill_loss_weight": float("nan")}, "distill_loss_weight must be finite"),
        ({"task_loss_weight": -1}, "task_loss_weight must be finite"),
        ({"attention_loss_weight": float("inf")}, "attention_loss_weight must be finite"),
        ({"dkd_beta": -1}, "dkd_beta must be finite"),
        ({"distill_loss_weight": 5}, "must not be negative, got distill_loss_weight=5; give task_loss_weight"),
        ({"distill_loss_weight": 0, "task_loss_weight": 0}, "at least one loss weight must be positive"),
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"teacher_class_indices": [0, 1]}, r"one teacher output per class of the student \(10\), got 2"),
        ({"teacher_class_indices": [0] * 10}, r"different outputs of the teacher \(0 to 9\)"),
        ({"teacher_class_indices": range(1, 11)}, r"different outputs of the teacher \(0 to 9\)"),
    ],
)
def test_options_out_of_range_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        build(teacher=tiny(seed=1), **kwargs)


@pytest.mark.parametrize(
    "name",
    ["task_loss_weight", "distill_loss_weight", "attention_loss_weight", "explanation_loss_weight", "temperature"],
)
def test_a_text_in_place_of_a_number_is_refused(name):
    with pytest.raises(InputTypeError, match=f"{name} must be a number, got str; give one"):
        build(teacher=tiny(seed=1), **{name: "0.5"})


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, LabeledCrossEntropy])
def test_a_criterion_that_is_a_class_is_refused(criterion):
    told = rf"criterion must be a loss module, got the class {criterion.__name__}; .*CrossEntropyLoss\(\)"
    with pytest.raises(InputTypeError, match=told):
        build(teacher=tiny(seed=1), criterion=criterion)
    build(teacher=tiny(seed=1), criterion=criterion())


@pytest.mark.parametrize("name", ["attention_loss_weight", "explanation_loss_weight"])
def test_a_weight_raised_from_0_afterwards_is_refused_and_one_that_was_there_may_change(name, batch):
    maps = {"maps": torch.rand(BATCH, 1, 32, 32)}
    task = build(tiny(), tiny(seed=1))
    setattr(task, name, 0.5)
    with pytest.raises(InputError, match=f"{name} is 0.5 in a task .* build the task with a weight above 0"):
        task(*batch, **maps)
    task = build(tiny(), tiny(seed=1), **{name: 0.5})
    term = name.removesuffix("_weight")
    for weight in (0.0, 0.25):
        setattr(task, name, weight)
        result = task(*batch, **maps)
        rest = task.task_loss_weight * result["task_loss"] + task.distill_loss_weight * result["distill_loss"]
        torch.testing.assert_close(result["loss"], rest + (weight * result[term] if weight else 0.0))


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"same classes, got 10 and 20; .*teacher_class_indices"):
        build(teacher=tiny(seed=1, classes=20))
    student = tiny()
    with pytest.raises(InputError, match=r"must not share weights.*pass a copy"):
        build(student, student)
    with pytest.raises(InputError, match="same channels, got in_chans 3 and 1"):
        build(teacher=tiny(in_chans=1))
    with pytest.raises(InputTypeError, match=r"teacher must be a model, got str; make it with timm\.create_model"):
        build(teacher="resnet18")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="student Identity has no parameters to train; make one with weights"):
        build(nn.Identity())
    nameless = Plain()
    nameless.pretrained_cfg = {}
    with pytest.raises(InputError, match="teacher's pretrained_cfg must name the mean and std"):
        build(teacher=nameless)


def test_settings_are_logged(caplog):
    with caplog.at_level("INFO"):
        build(teacher=tiny(seed=1), **AT)
    assert (
        "attention_loss_weight=0.8 (entries 2, 2); teacher: view same, input 32x32, mean [0.5, 0.5, 0.5]" in caplog.text
    )
