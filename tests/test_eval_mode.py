import types

import pytest
import timm
import torch
from torch import nn

from timm_igkd import load_labeled_images, truncate
from timm_igkd.attribution.teacher_copy import teacher_copy
from timm_igkd.distillation.live_teacher import LiveTeacher, resolve_attention_index
from timm_igkd.eval_mode import copy_model, eval_mode
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.models.loading import count_macs


def partly_frozen() -> nn.Module:
    """Return a model in train mode whose batch norms are frozen in eval mode, as in fine-tuning."""
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_every_module_gets_its_own_mode_back():
    model, teacher = partly_frozen(), LiveTeacher(partly_frozen(), partly_frozen())
    before = modes(model), modes(teacher)
    with eval_mode(model, teacher):
        assert not any((modes(model) | modes(teacher)).values())
    assert (modes(model), modes(teacher)) == before
    assert {*before[0].values()} == {True, False}


def test_modes_come_back_after_an_error():
    model = partly_frozen()
    before = modes(model)
    with pytest.raises(RuntimeError, match="channels"), eval_mode(model, device="cpu"):
        model(torch.zeros(1, 4, 32, 32))
    assert modes(model) == before


@pytest.mark.parametrize("look", ["macs", "attention", "evaluation"])
def test_looking_at_a_model_leaves_its_modes_and_statistics(look, tiny_images):
    model = partly_frozen()
    before, tensors = modes(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if look == "macs":
        assert count_macs(model) > 0
    elif look == "attention":
        resolve_attention_index("student", model, None)
    else:
        images = load_labeled_images(str(tiny_images()), "train")
        evaluate(model, images, measure_latency=False, progress=False)
    assert modes(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_what_accelerate_prepared_computes_in_its_own_precision_where_it_is_copied_or_measured(bf16_accelerator):
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    assert bf16_accelerator.prepare_model(model) is model
    in_bfloat16 = model(images)
    assert not torch.equal(in_bfloat16, expected)
    for copied in (copy_model(model), teacher_copy(model), truncate(model, 0)):
        assert torch.equal(copied(images), expected)
    with eval_mode(model):
        assert torch.equal(model(images), expected)
    assert torch.equal(model(images), in_bfloat16)


def test_a_forward_of_a_models_own_stays_where_accelerate_is_taken_off(bf16_accelerator):
    model = nn.Linear(2, 2)
    model.forward = types.MethodType(lambda self, x: x + 1, model)
    bf16_accelerator.prepare_model(model)
    with eval_mode(model):
        assert torch.equal(model(torch.zeros(1, 2)), torch.ones(1, 2))
    assert torch.equal(copy_model(model)(torch.zeros(1, 2)), torch.ones(1, 2))
