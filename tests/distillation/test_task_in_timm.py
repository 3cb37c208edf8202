"""IGDistillationTask in a training by timm: checkpoints, EMA, distribution, compilation."""

import copy

import pytest
import torch
from task_parts import AT, build, tiny
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import nn

from timm_igkd.distillation.live_teacher import LiveTeacher
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputTypeError

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
