"""Students whose maps or features would be wrong, or could not be asked for, are refused by the task."""

from typing import Any

import pytest
import timm
import torch
from explained_parts import CLASSES, KINDS, SIZE, E, batch_with_maps, build, gradients, tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_igkd.errors import InputError


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_with_maps()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_vit", "densenet121", "resnet20_cifar"])
def test_gradient_checkpointing_is_refused_whenever_it_is_switched_on(name, kind, batch):
    """Its second pass ran without what makes the first twice differentiable: wrong gradients of hard-sigmoid nets."""
    told = r"gradient checkpointing spoils; call student\.set_grad_checkpointing\(False\)"
    student = tiny(name)
    student.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(InputError, match=told):
        build(student, explanation_map=kind, **E)
    student.set_grad_checkpointing(False)  # type: ignore[operator]
    task = build(student, explanation_map=kind, **E)
    student.set_grad_checkpointing(True)  # type: ignore[operator]
    for training in (True, False):
        with pytest.raises(InputError, match=told):
            task.train(training)(**batch)
    assert "explanation_loss" not in task.eval()(batch["input"], batch["target"])  # without a map nothing is refused
    build(student)(batch["input"], batch["target"])["loss"].backward()


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_grad_cam_of_a_student_that_drops_patches_is_refused(name, batch):
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=CLASSES, img_size=SIZE, patch_drop_rate=0.5)
    student.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
    with pytest.raises(InputError, match=r"need whole feature maps, student \w+ drops patches in training"):
        build(student, explanation_map="grad_cam", **E)
    assert build(student, **E)(**batch)["explanation_loss"] > 0  # input times gradient is of the pixels


class Scaled(type(tiny())):  # type: ignore[misc]
    """A student whose forward does more than its features and head."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * super().forward(x)


def test_grad_cam_of_a_student_whose_forward_is_another_function_is_refused(batch):
    """It was trained as another function than the one that evaluation and the export call."""
    student = tiny()
    student.__class__ = Scaled
    told = "forward_features and forward_head of Scaled must lead to the logits of its forward, got others"
    with pytest.raises(InputError, match=told):
        build(student, explanation_map="grad_cam", **E)
    task = build(student, **E).eval()
    torch.testing.assert_close(task(**batch)["output"], student(batch["input"]))


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of a class token, in DDP's buckets: its speed alone
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_distributed_student_is_refused_where_its_own_features_are_asked_for(name, batch, process_group):
    """Attention transfer ended in an AttributeError at the first batch; what calls its forward goes on working."""

    def distributed() -> nn.Module:
        return nn.parallel.DistributedDataParallel(tiny(name))

    told = "cannot be trained inside DistributedDataParallel; give the model itself, and wrap the task"
    with pytest.raises(InputError, match=told):
        build(distributed(), tiny(seed=1), attention_loss_weight=0.8)
    works: list[dict[str, Any]] = [E | {"explanation_map": "grad_cam"}]  # of a ViT's, by a hook
    if name == "test_resnet":
        works = [{}, E]
        with pytest.raises(InputError, match=told):
            build(distributed(), explanation_map="grad_cam", **E)
    for kwargs in works:
        plain, wrapped = (build(model, **kwargs) for model in (tiny(name), distributed()))
        losses = [task(**batch if kwargs else {k: batch[k] for k in ("input", "target")}) for task in (plain, wrapped)]
        for result in losses:
            result["loss"].backward()
        assert torch.equal(losses[0]["loss"], losses[1]["loss"])
        for a, b in zip(gradients(plain), gradients(wrapped), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel])
def test_a_wrapped_student_is_refused_before_its_first_batch(wrap):
    with pytest.raises(InputError, match=f"cannot be trained inside {wrap.__name__}; give the model itself"):
        build(wrap(tiny()), **E)
