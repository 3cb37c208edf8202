"""IGDistillationTask: two views, stored logits, and attention between architectures."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from task_parts import AT, BATCH, CLASSES, Plain, build, spied, tiny
from timm.data.loader import fast_collate
from tiny_parts import ImageList, noise_image
from torch import Tensor, nn
from torch.utils.data import default_collate

from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy
from timm_igkd.distillation.losses import attention_transfer
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.overlaid_views import TwoViews

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
    task = build(student, teacher, student_attention_index=1, teacher_attention_index=-2, **AT).eval()
    (ours,) = student.forward_intermediates(batch[0], indices=[1], intermediates_only=True)
    (theirs,) = teacher.forward_intermediates(batch[0], indices=[3], intermediates_only=True)
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


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "hiera_tiny_224"])
def test_attention_of_a_student_that_drops_patches_is_refused(name):
    """The patches that were left stood in any order and count, in training alone; a teacher drops none."""
    sizes: dict[str, Any] = {"size": 64} if name == "test_vit" else {"img_size": 64}
    student = tiny(name, patch_drop_rate=0.5, **sizes)
    with pytest.raises(InputError, match=r"need whole feature maps, student \w+ drops patches.*patch_drop_rate=0"):
        build(student, tiny(seed=1), **AT)
    assert build(student, tiny(seed=1)).attention_loss_weight == 0


def test_a_teacher_that_was_built_to_drop_patches_drops_none():
    plain, dropping = (tiny("test_vit", seed=1, size=64, patch_drop_rate=rate) for rate in (0.0, 0.5))
    images, labels = torch.randn(2, 3, 64, 64), torch.arange(2)
    losses = [build(tiny(size=64), teacher, **AT).train()(images, labels) for teacher in (plain, dropping)]
    assert torch.equal(losses[0]["attention_loss"], losses[1]["attention_loss"])


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


def test_a_dataset_of_one_view_is_seen_by_a_task_of_flat_ones(batch):
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 0, 1])
    task = build(teacher=tiny(seed=1), teacher_view="clean", view_layout="flat").train()
    with pytest.raises(InputError, match="got 4 images and 4 targets that are not repeated; make the loader's items"):
        task(images, target)


@pytest.mark.parametrize("teacher", [tiny(seed=1), None])
def test_a_dataset_of_two_flat_views_is_seen_by_a_task_of_one(teacher):
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    both = torch.cat([images, images])
    both[0] += 1  # overlaid
    task = build(teacher=teacher, distill_loss_weight=0.1 if teacher else 0.0).train()
    with pytest.raises(InputError, match=r"each image twice.*teacher_view='clean' and view_layout='flat'"):
        task(both, target.repeat(2))
    for later in (both, images):  # of the first batch alone: it waits for the device
        assert len(task(later, target.repeat(len(later) // 4))["output"]) == len(later)
    fresh = build(teacher=teacher, distill_loss_weight=0.1 if teacher else 0.0)
    assert len(fresh.eval()(both, target.repeat(2))["output"]) == 8
    assert len(fresh.train()(images, target)["output"]) == 4


@pytest.mark.parametrize("kinds", [[0] * 8, [0, 0, 0, 1] * 2, [0, 1, 0, 1] * 2], ids=str)
@pytest.mark.parametrize("constant", [True, False])
def test_equal_images_of_equal_labels_are_not_two_views(kinds, constant):
    """A batch of constant images, or of copies of one, was refused as holding each image twice."""
    images = torch.stack([torch.full((3, 32, 32), i / 2) if constant else torch.randn(3, 32, 32) for i in range(2)])
    task = build(teacher=tiny(seed=1)).train()
    assert len(task(images[kinds], torch.zeros(8, dtype=torch.int64))["output"]) == 8


def test_two_flat_views_are_seen_where_some_images_are_there_more_often():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    images[1], labels[1] = images[0], labels[0]
    with pytest.raises(InputError, match="each image twice"):
        build(teacher=tiny(seed=1)).train()(images.repeat(2, 1, 1, 1), labels.repeat(2))


def test_a_loss_that_has_nothing_to_learn_of_two_classes_is_refused():
    two = {"num_classes": 2}
    student, teacher = (timm.create_model("test_resnet", **two) for _ in range(2))
    with pytest.raises(InputError, match=r"'standardized' needs 3 classes or more, got 2: .* use loss_type 'kl'"):
        IGDistillationTask(student, teacher, loss_type="standardized", verbose=False)
    IGDistillationTask(student, loss_type="standardized", distill_loss_weight=0, verbose=False)


def test_decoupled_distillation_of_images_without_labels_is_refused():
    with pytest.raises(InputError, match="loss_type 'dkd' needs the label of every image"):
        IGDistillationTask(tiny(), tiny(seed=1), LabeledCrossEntropy(), loss_type="dkd", verbose=False)
    options = {"loss_type": "dkd", "distill_loss_weight": 0, "verbose": False}
    task = IGDistillationTask(tiny(), tiny(seed=1), LabeledCrossEntropy(), **options)
    task.distill_loss_weight = 0.5
    with pytest.raises(InputError, match="loss_type 'dkd' needs the label of every image"):
        task(torch.zeros(2, 3, 32, 32), torch.tensor([0, -1]))
