import types
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_igkd import load_labeled_images, truncate
from timm_igkd.attribution.teacher_copy import teacher_copy
from timm_igkd.distillation.live_teacher import LiveTeacher, resolve_attention_index
from timm_igkd.eval_mode import copy_model, eval_mode, exact_arithmetic
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


# ---- float32 in float32 ----

BACKENDS: Any = torch.backends
SETTINGS = {
    "cpu": (BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul),
    "cuda": (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul),
}
"""Of each device, whose contexts are entered here without one."""


def as_torch_begins() -> None:
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.conv.fp32_precision = "tf32"


@pytest.fixture(params=["medium", "all"])
def short_products(request: pytest.FixtureRequest) -> Iterator[None]:
    """A host that lets products of float32 be shorter, by the one function of torch or by the other."""
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    else:
        BACKENDS.fp32_precision = "tf32"
    yield
    as_torch_begins()


def precisions(device: str) -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS[device]]


@pytest.mark.usefixtures("short_products")
@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_products_are_in_full_float32_and_the_hosts_settings_return(device, other):
    before, beside = precisions(device), precisions(other)
    assert {"tf32", "bf16"} & {*before}
    with exact_arithmetic(torch.device(device)):
        assert {*precisions(device)} <= {"ieee", "none"}
        assert precisions(other) == beside
        with exact_arithmetic(torch.device(device)):
            pass
        assert {*precisions(device)} <= {"ieee", "none"}
    assert precisions(device) == before


@pytest.mark.parametrize("device", SETTINGS)
def test_what_a_setting_has_of_its_parent_follows_that_one_afterwards(device):
    try:
        BACKENDS.fp32_precision = "tf32"
        with exact_arithmetic(torch.device(device)):
            pass
        BACKENDS.fp32_precision = "ieee"
        assert precisions(device) == ["ieee", "ieee"]
    finally:
        as_torch_begins()


@pytest.mark.usefixtures("short_products")
def test_products_stay_in_full_float32_until_the_last_thread_leaves():
    before = precisions("cpu")
    first, second = (exact_arithmetic(torch.device("cpu")) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert {*precisions("cpu")} <= {"ieee", "none"}
    second.__exit__(None, None, None)
    assert precisions("cpu") == before


def test_convolutions_on_a_gpu_are_in_float32_by_default_too():
    """cuDNN's default is TF32."""
    as_torch_begins()
    assert precisions("cuda")[0] == "tf32"
    with exact_arithmetic(torch.device("cuda")):
        assert precisions("cuda")[0] == "ieee"
    assert precisions("cuda")[0] == "tf32"
