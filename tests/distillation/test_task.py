"""IGDistillationTask: what it computes, what it leaves alone, what it refuses."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.loader import fast_collate
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from tiny_parts import ImageList, noise_image
from torch import Tensor, nn
from torch.utils.data import default_collate

from timm_igkd.distillation.live_teacher import LiveTeacher
from timm_igkd.distillation.losses import attention_transfer, kd_dkd, kd_kl
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.overlaid_views import TwoViews

CLASSES, BATCH = 10, 4
AT: dict[str, Any] = {"attention_loss_weight": 0.8}


def tiny(name: str = "test_resnet", seed: int = 0, size: int = 32, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    if "vit" in name:
        kwargs["img_size"] = size
    overlay = {"input_size": (3, size, size), **kwargs.pop("cfg", {})}
    return timm.create_model(name, num_classes=kwargs.pop("classes", CLASSES), pretrained_cfg_overlay=overlay, **kwargs)


def build(student: nn.Module | None = None, teacher: nn.Module | None = None, **kwargs: Any) -> IGDistillationTask:
    kwargs.setdefault("teacher_view", "same")
    return IGDistillationTask(student or tiny(), teacher, **kwargs)


def spied(task: IGDistillationTask) -> list[Tensor]:
    """Return the list that collects what the teacher's own model is fed."""
    seen: list[Tensor] = []
    assert task.teacher is not None
    task.teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 32, 32, generator=rng), torch.arange(BATCH)


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


def test_teacher_class_indices_select_the_students_classes(batch):
    indices = [19, 3, 5, 7, 0, 2, 4, 6, 8, 10]
    student, teacher = tiny().eval(), tiny(seed=1, classes=20)
    task = build(student, teacher, teacher_class_indices=indices).eval()
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


# ---- two views


def test_clean_view_splits_the_batch_of_timms_collate():
    task = build(teacher=tiny(seed=1), teacher_view="clean", view_layout="flat").train()
    items = [((torch.full((3, 32, 32), i).byte(), torch.full((3, 32, 32), 100 + i).byte()), i) for i in range(3)]
    input, target = fast_collate(items)
    assert len(input) == 6
    seen = spied(task)
    students: list[Tensor] = []
    task.trainable_module.register_forward_pre_hook(lambda _, args: students.append(args[0]))
    result = task(input.float(), target)
    assert students[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert seen[0][:, 0, 0, 0].tolist() == [100, 101, 102]
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(result["output"], target[:3]))


def test_clean_view_may_come_as_teacher_input(batch):
    input, target = batch
    clean = input + 1
    teacher = tiny(seed=1)
    split = build(tiny(), teacher, teacher_view="clean", view_layout="flat", **AT).train()
    explicit = build(tiny(), teacher, teacher_view="clean", **AT).train()
    expected = split(torch.cat([input, clean]), target.repeat(2))
    result = explicit(input, target, teacher_input=clean)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_same_view_is_the_students_own(batch):
    task = build(teacher=tiny(seed=1), teacher_view="same").train()
    seen = spied(task)
    assert len(task(*batch)["output"]) == BATCH
    assert torch.equal(seen[0], batch[0])


def test_clean_and_same_differ(batch):
    input, target = batch
    teacher = tiny(seed=1)
    clean = build(tiny(), teacher, teacher_view="clean").train()((input, -input), target)
    same = build(tiny(), teacher, teacher_view="same").train()(input, target)
    assert torch.equal(clean["task_loss"], same["task_loss"])
    assert not torch.isclose(clean["distill_loss"], same["distill_loss"])


def test_soft_targets_of_two_views_in_one_batch_are_refused(batch):
    """Mixup mixes each with another, and element by element with another share."""
    input, target = batch
    soft = F.one_hot(target, CLASSES).float()
    task = build(teacher=tiny(seed=1), teacher_view="clean", view_layout="flat").train()
    with pytest.raises(InputError, match=r"mix the two views of an image with others.*TwoViewMixup"):
        task(input.repeat(2, 1, 1, 1), soft.repeat(2, 1))


def test_eval_mode_does_not_split(batch):
    task = build(teacher=tiny(seed=1), teacher_view="clean").eval()
    assert len(task(*batch)["output"]) == BATCH


@pytest.mark.parametrize(
    ("teacher", "view", "expected"), [(None, "clean", False), (tiny(), "same", False), (tiny(), "clean", True)]
)
def test_two_view_batches_says_what_the_loader_must_give(teacher, view, expected):
    assert build(tiny(), teacher, teacher_view=view).two_view_batches is expected


@pytest.mark.parametrize("target", [torch.arange(3), torch.arange(2)])
def test_a_flat_batch_that_is_not_two_views_is_refused(target):
    task = build(teacher=tiny(seed=1), teacher_view="clean", view_layout="flat").train()
    with pytest.raises(InputError, match=r"targets repeated; got 3 images and \d targets; .*teacher_view='same'"):
        task(torch.randn(3, 3, 32, 32), target)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 0]])
def test_labels_that_repeat_do_not_make_two_views_of_one(labels):
    """Four images of labels 0, 1, 0, 1 became two rows of output, without an error."""
    images, target = torch.randn(4, 3, 32, 32), torch.tensor(labels)
    with pytest.raises(InputError, match="teacher_view 'clean' needs two views of every image, got one tensor"):
        build(teacher=tiny(seed=1), teacher_view="clean").train()(images, target)
    assert len(build(teacher=tiny(seed=1)).train()(images, target)["output"]) == 4
    assert len(IGDistillationTask(tiny(), tiny(seed=1), verbose=False).train()(images, target)["output"]) == 4


def test_pair_of_views_says_itself_which_is_whose(batch):
    input, target = batch
    items = [(TwoViews((image, image + 1)), int(label)) for image, label in zip(input, target, strict=True)]
    views, labels = default_collate(items)
    task = build(teacher=tiny(seed=1), teacher_view="clean").train()
    seen = spied(task)
    assert len(task(views, labels)["output"]) == BATCH
    assert torch.equal(seen[0], input + 1)


@pytest.mark.parametrize("parts", [1, 3])
def test_other_numbers_of_views_are_refused(batch, parts):
    task = build(teacher=tiny(seed=1), teacher_view="clean").train()
    with pytest.raises(InputError, match=f"got {parts} parts"):
        task([batch[0]] * parts, batch[1])


def test_default_view_is_the_same_for_dataset_and_task():
    assert IGDistillationTask(tiny(), tiny(seed=1), verbose=False).teacher_view == "same"
    assert IGOverlayDataset(ImageList([noise_image(0)], [0]), None).teacher_view == "same"


def test_teacher_input_that_nobody_sees_is_refused(batch):
    with pytest.raises(InputError, match="teacher_view is 'same'; leave it out"):
        build(teacher=tiny(seed=1))(*batch, teacher_input=batch[0])
    with pytest.raises(InputError, match="there is no live teacher; leave it out"):
        build(teacher_view="clean")(*batch, teacher_input=batch[0])
    with pytest.raises(InputError, match=r"one view per image of input \(4\), got 3"):
        build(teacher=tiny(seed=1), teacher_view="clean")(*batch, teacher_input=batch[0][:3])


# ---- stored logits


def test_stored_logits_give_the_loss_of_the_live_teacher(batch):
    teacher = tiny(seed=1).eval()
    live = build(tiny(), teacher)(*batch)
    stored = build(tiny())(*batch, teacher_logits=teacher(batch[0]).detach())
    torch.testing.assert_close(stored["loss"], live["loss"])
    assert set(stored) == set(live)


def test_stored_logits_of_all_teacher_outputs_go_through_the_class_indices(batch):
    logits = torch.randn(BATCH, 20)
    indices = list(range(10, 20))
    selected = build(tiny())(*batch, teacher_logits=logits[:, indices])
    result = build(tiny(), teacher_class_indices=indices)(*batch, teacher_logits=logits)
    assert torch.equal(result["loss"], selected["loss"])
    with pytest.raises(InputError, match="go up to 19, got 10 teacher outputs; leave teacher_class_indices out"):
        build(tiny(), teacher_class_indices=indices)(*batch, teacher_logits=logits[:, :10])


def test_stored_logits_are_refused_where_they_do_not_belong(batch):
    input, target = batch
    logits = torch.zeros(BATCH, CLASSES)
    with pytest.raises(InputError, match="soft targets of Mixup or CutMix; switch those off"):
        build()(input, F.one_hot(target, CLASSES).float(), teacher_logits=logits)
    with pytest.raises(InputError, match="got stored logits; leave teacher_logits out, or set attention_loss_weight=0"):
        build(teacher=tiny(seed=1), **AT)(input, target, teacher_logits=logits)
    with pytest.raises(InputError, match=r"from one source.*teacher=None"):
        build(teacher=tiny(seed=1))(input, target, teacher_logits=logits)
    with pytest.raises(InputError, match=r"one shape \(batch, classes\), got \(4, 10\) and \(3, 10\)"):
        build()(input, target, teacher_logits=logits[:3])


def test_no_teacher_at_all_is_refused(batch):
    with pytest.raises(InputError, match="neither a live one nor stored logits; pass teacher or teacher_logits"):
        build()(*batch)


# ---- attention transfer between architectures


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("test_resnet", "test_vit"), ("test_convnext", "test_resnet"), ("test_vit", "test_convnext")],
)
def test_attention_transfer_between_any_two_architectures(student, teacher):
    model = tiny(student, size=64)
    task = build(model, tiny(teacher, seed=1, size=64), distill_loss_weight=0, task_loss_weight=0, **AT).train()
    result = task(torch.randn(2, 3, 64, 64), torch.arange(2))
    result["loss"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert result["attention_loss"] > 0
    assert sum(g.abs().sum() for g in gradients) > 0


def test_student_runs_once_per_step(batch):
    student = tiny()
    calls: list[Any] = []
    task = build(student, tiny(seed=1), **AT)
    student.conv1.register_forward_hook(lambda *args: calls.append(args))
    task(*batch)
    assert len(calls) == 1


def test_attention_indices_choose_the_entries(batch):
    student, teacher = tiny().eval(), tiny(seed=1)
    task = build(student, teacher, student_attention_index=1, teacher_attention_index=-1, **AT).eval()
    (ours,) = student.forward_intermediates(batch[0], indices=[1], intermediates_only=True)
    (theirs,) = teacher.forward_intermediates(batch[0], indices=[4], intermediates_only=True)
    torch.testing.assert_close(task(*batch)["attention_loss"], attention_transfer(ours, theirs))


def test_looking_for_the_middle_entry_leaves_the_student_as_it_was():
    student = tiny().train()
    student.bn1.eval()
    teacher = tiny(seed=1)
    before, random_state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    build(student, teacher, **AT)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert student.layer1.training
    assert not student.bn1.training


class Plain(nn.Module):
    """A model that is not timm's."""

    num_classes, in_chans = CLASSES, 3
    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Disagreeing(Plain):
    """A model whose forward does more than its forward_intermediates and forward_head."""

    def forward_intermediates(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        return x, [x]

    def forward_head(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_model_that_is_not_timms_distils(batch):
    assert build(Plain(), Plain())(*batch)["loss"].isfinite()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_attention_refuses_models_it_cannot_read(role):
    def pair(model: nn.Module) -> list[nn.Module]:
        return [model, tiny()] if role == "student" else [tiny(), model]

    with pytest.raises(InputError, match=f"forward_intermediates, which {role} Plain lacks.*attention_loss_weight=0"):
        build(*pair(Plain()), **AT)
    with pytest.raises(InputError, match=f"forward_intermediates of {role} Disagreeing must lead to the logits"):
        build(*pair(Disagreeing()), **AT)
    with pytest.raises(InputError, match=rf"{role}_attention_index must be in \[-5, 4\] for ResNet, got 5"):
        build(*pair(tiny(seed=2)), **{f"{role}_attention_index": 5}, **AT)


def test_attention_without_a_live_teacher_is_refused():
    with pytest.raises(InputError, match="attention transfer needs a live teacher's features"):
        build(**AT)


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


# ---- checkpoints, EMA, distribution, compilation


@pytest.mark.parametrize("kwargs", [{}, AT])
def test_checkpoint_is_the_plain_students(kwargs, batch):
    student = tiny()
    task = build(student, tiny(seed=1), **kwargs)
    task.setup_ema(decay=0.5)
    assert task.get_eval_model() is student
    for state in (task.get_checkpoint_state()["state_dict"], task.get_checkpoint_state(ema=True)["state_dict_ema"]):
        assert list(state) == list(student.state_dict())
        tiny(seed=2).load_state_dict(state)
    other = tiny(seed=2)
    task.load_checkpoint_state(other.state_dict())
    torch.testing.assert_close(student.eval()(batch[0]), other.eval()(batch[0]))


@pytest.mark.parametrize("kwargs", [{}, AT])
def test_ema_follows_the_student(kwargs, batch):
    student = tiny()
    start = copy.deepcopy(student.state_dict())
    task = build(student, tiny(seed=1), **kwargs).train()
    task.setup_ema(decay=0.5)
    task(*batch)["loss"].backward()
    torch.optim.SGD(task.trainable_module.parameters(), lr=1.0).step()
    task.update_ema()
    ema = task.get_eval_model(ema=True)
    assert ema is not None
    assert type(ema) is type(student)
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ema.state_dict()[name], (start[name] + value) / 2)


def test_parameter_groups_are_the_students():
    def groups(module: nn.Module) -> list[tuple[int, float, float]]:
        optimizer = create_optimizer_v2(module, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
        return [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups]

    task = build(tiny("test_vit", size=64), tiny(seed=1), **AT)
    assert groups(task.trainable_module) == groups(tiny("test_vit", size=64))


@pytest.mark.parametrize("kwargs", [{}, AT])
def test_distributed_task_trains_and_saves_the_same_student(kwargs, batch, process_group):
    single, student = build(tiny(), tiny(seed=1), **kwargs).train(), tiny()
    task = build(student, tiny(seed=1), **kwargs).train().prepare_distributed()
    task.setup_ema()
    assert not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in task.trainable_module_ema.modules())
    expected, result = single(*batch), task(*batch)
    assert torch.equal(result["loss"], expected["loss"])
    result["loss"].backward()
    task.update_ema()
    assert all(p.grad is not None for p in student.parameters())
    assert task.get_eval_model() is student
    assert list(task.get_checkpoint_state()["state_dict"]) == list(student.state_dict())
    assert list(task.get_checkpoint_state(ema=True)["state_dict_ema"]) == list(student.state_dict())


def test_module_prepared_by_accelerate_trains(batch, bf16_accelerator):
    student = tiny()
    task = build(student, tiny(seed=1), device=bf16_accelerator.device, **AT).train()
    task.trainable_module = bf16_accelerator.prepare(task.trainable_module)
    task.setup_ema()
    with bf16_accelerator.autocast():
        result = task(*batch)
    bf16_accelerator.backward(result["loss"])
    task.update_ema()
    assert result["loss"].dtype == torch.float32
    assert task.get_eval_model() is student
    assert list(task.get_checkpoint_state()["state_dict"]) == list(tiny().state_dict())


@pytest.mark.parametrize("kwargs", [{}, AT])
def test_compiled_task_gives_the_same_loss_and_keys(kwargs, batch):
    student = tiny()
    task = build(student, tiny(seed=1), **kwargs).train()
    expected = build(copy.deepcopy(student), tiny(seed=1), **kwargs).train()(*batch)["loss"]
    task.setup_ema()
    evaluated = task.compile(backend="eager")
    assert task.get_eval_model() is evaluated
    result = task(*batch)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"], expected)
    assert list(task.get_checkpoint_state()["state_dict"]) == list(student.state_dict())
    torch.testing.assert_close(evaluated.eval()(batch[0]), student.eval()(batch[0]))
    task.update_ema()


# ---- timm's contract


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.99, 0.01)),
        ({"task_loss_weight": 0.3}, (0.3, 0.7)),
        ({"task_loss_weight": 1.0}, (1.0, 0.0)),
        ({"task_loss_weight": 2.0}, (2.0, 0.0)),
        ({"distill_loss_weight": 0.3}, (0.7, 0.3)),
        ({"task_loss_weight": 1.0, "distill_loss_weight": 1.0}, (1.0, 1.0)),
    ],
)
def test_one_weight_alone_gives_the_other(given, expected):
    task = IGDistillationTask(tiny(), tiny(seed=1), verbose=False, **given)
    assert (task.task_loss_weight, task.distill_loss_weight) == pytest.approx(expected)


def test_task_weight_alone_means_what_it_means_in_timm(batch):
    student, teacher = tiny(), tiny(seed=1)
    options = {"criterion": nn.CrossEntropyLoss(), "task_loss_weight": 0.3, "temperature": 4.0, "verbose": False}
    theirs = LogitDistillationTask(student_model=student, teacher_model=teacher, **options).eval()
    ours = IGDistillationTask(student_model=student, teacher_model=teacher, **options).eval()
    expected, found = theirs(*batch), ours(*batch)
    for name in ("loss", "output", "task_loss", "kd_loss"):
        torch.testing.assert_close(found[name], expected[name])


def test_a_task_needs_a_student():
    with pytest.raises(InputTypeError, match="needs a student"):
        IGDistillationTask(teacher=tiny())


def test_teachers_input_is_made_smaller_with_antialiasing():
    """Every fourth column is white: at a quarter of the size that is grey; points in between would be black."""
    live = LiveTeacher(tiny(seed=1), tiny(), None, (8, 8))
    board = torch.zeros(1, 3, 32, 32)
    board[..., ::4] = 1
    found = live.prepare_input(board)
    assert found.shape == (1, 3, 8, 8)
    grey = live.prepare_input(torch.full_like(board, 0.25))
    torch.testing.assert_close(found[..., 1:-1], grey[..., 1:-1], atol=0.1, rtol=0)
