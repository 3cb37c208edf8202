"""bfloat16 in float32's arithmetic: what autocast gives is the exact product of rounded numbers, rounded."""

import importlib
import shutil

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_igkd import rounded_bfloat16
from timm_igkd.environment import environment

aten = torch.ops.aten

ULP = 2.0**-8  # a rounding to bfloat16 is off by half of its last place at most: 2^-9 of the value, two of them 2^-8


@pytest.fixture
def rounded():
    rounded_bfloat16.compute_in_float32()
    yield
    rounded_bfloat16.compute_in_bfloat16()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


# what is computed, with the shapes of what it is computed of
PRODUCTS = {
    "linear": (F.linear, (5, 7), (3, 7), (3,)),
    "matmul": (torch.matmul, (2, 5, 7), (7, 3)),
    "operator": (lambda a, b: a @ b, (5, 7), (7, 3)),
    "mm": (torch.mm, (5, 7), (7, 3)),
    "bmm": (torch.bmm, (2, 5, 7), (2, 7, 3)),
    "addmm": (torch.addmm, (5, 3), (5, 7), (7, 3)),
    "addbmm": (torch.addbmm, (5, 3), (2, 5, 7), (2, 7, 3)),
    "baddbmm": (torch.baddbmm, (2, 5, 3), (2, 5, 7), (2, 7, 3)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (2, 5, 7), (2, 7, 3)),
    "vecdot": (torch.linalg.vecdot, (5, 7), (5, 7)),
    "conv1d": (F.conv1d, (2, 4, 9), (6, 4, 3), (6,)),
    "conv2d": (F.conv2d, (2, 4, 9, 9), (6, 4, 3, 3), (6,)),
    "conv2d, same": (lambda x, w: F.conv2d(x, w, padding="same"), (2, 4, 9, 9), (6, 4, 3, 3)),
    "depthwise": (lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=4), (2, 4, 9, 9), (4, 1, 3, 3)),
    "conv3d": (F.conv3d, (2, 4, 5, 5, 5), (6, 4, 3, 3, 3), (6,)),
    "conv_transpose1d": (F.conv_transpose1d, (2, 4, 9), (4, 6, 3), (6,)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 4, 9, 9), (4, 6, 3, 3), (6,)),
    "conv_transpose3d": (F.conv_transpose3d, (2, 4, 5, 5, 5), (4, 6, 3, 3, 3)),
    "attention": (attention, (2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
}


def gradients(compute, inputs, weight):
    """Return a product and the gradients of its sum with weights to its inputs."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    result = compute(*inputs)
    (result * weight.to(result.dtype)).sum().backward()
    return result.detach(), [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_and_its_gradients_are_the_exact_ones_of_rounded_numbers_rounded(name, rounded):
    compute, *shapes = PRODUCTS[name]
    inputs = [numbers(*shape, seed=index) for index, shape in enumerate(shapes)]
    of_rounded = [tensor.bfloat16().double() for tensor in inputs]
    weight = numbers(*compute(*inputs).shape, seed=9).bfloat16()
    expected, expected_gradients = gradients(compute, of_rounded, weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, found_gradients = gradients(compute, inputs, weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=ULP, atol=1e-5)
    for gradient, exact in zip(found_gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradient.bfloat16().float())
        torch.testing.assert_close(gradient.double(), exact, rtol=ULP, atol=1e-5)


class ProductsIn(TorchDispatchMode):
    """Notes the dtypes that matrix products and convolutions are computed in, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm):
            self.found |= {(str(func.overloadpacket), arg.dtype) for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


def weight_gradients(model, compiled=False):
    run = torch.compile(model) if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        output = run(numbers(4, 3, 8, 8))
    output.float().square().sum().backward()
    return [model[index].weight.grad for index in (0, 3, 5)]


def test_torchs_products_in_bfloat16_are_not_called(rounded):
    """Neither forward nor backward: the latter's weight gradients are garbage now and then."""
    with ProductsIn() as products:
        weight_gradients(network())
    names = {name for name, _ in products.found}
    assert {"aten.convolution", "aten.convolution_backward", "aten.mm", "aten.addmm"} == names
    assert {dtype for _, dtype in products.found} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_models_round_too(rounded):
    eager, compiled = weight_gradients(network()), weight_gradients(network(), compiled=True)
    for ours, theirs in zip(eager, compiled, strict=True):
        assert torch.equal(theirs, theirs.bfloat16().float())
        torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02 * ours.abs().max().item())


@pytest.mark.parametrize("has_it", [True, False])
def test_it_is_for_processors_that_lack_bfloat16(monkeypatch, has_it):
    monkeypatch.setattr(rounded_bfloat16, "cpu_has_bfloat16", lambda: has_it)
    assert rounded_bfloat16.round_where_missing() is not has_it
    assert ("bfloat16" in environment()) is not has_it
    rounded_bfloat16.compute_in_bfloat16()
    assert "bfloat16" not in environment()


@pytest.mark.parametrize("has_gpu", [False, True])
def test_compiled_code_of_a_gpu_stays_as_it_is(monkeypatch, has_gpu):
    config = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(rounded_bfloat16, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    before = config.emulate_precision_casts
    with rounded_bfloat16.rounded_where_missing():
        assert rounded_bfloat16.computes_in_float32()
        assert config.emulate_precision_casts is not has_gpu
    assert config.emulate_precision_casts is before is False
    assert not rounded_bfloat16.computes_in_float32()


def test_every_overload_is_one_that_autocast_lowers():
    for product in rounded_bfloat16.PRODUCTS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{product}", "AutocastCPU"), product


def test_it_is_of_autocast_alone_and_can_be_taken_back(rounded):
    weight = numbers(3, 7)
    assert F.linear(numbers(5, 7), weight).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(numbers(5, 7).double(), weight.double()).dtype == torch.float64
        assert F.softmax(numbers(5, 7), 1).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert F.linear(numbers(5, 7), weight).dtype == torch.float32
    rounded_bfloat16.compute_in_float32()  # a second time is none
    rounded_bfloat16.compute_in_bfloat16()
    assert not rounded_bfloat16.computes_in_float32()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(numbers(5, 7), weight).dtype == torch.bfloat16


def test_float16_is_rounded_to_float16(rounded):
    with torch.autocast("cpu", torch.float16):
        found = F.linear(numbers(5, 7), numbers(3, 7, seed=1))
    expected = F.linear(numbers(5, 7).half().double(), numbers(3, 7, seed=1).half().double())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-11, atol=1e-5)


def test_the_range_is_bfloat16s(rounded):
    """Of float16, which ends at 65,504, nothing is left."""
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.full((1, 2), 1e7), torch.full((1, 2), 1e30)).item() == pytest.approx(2e37, rel=2 * ULP)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_model_gives_what_torchs_own_bfloat16_gives(name):
    """Forward passes alone, which torch computes right on every processor."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    images = numbers(4, 3, 64, 64) if name != "test_vit" else numbers(4, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            own = model(images).float()
            rounded_bfloat16.compute_in_float32()
            found = model(images).float()
    rounded_bfloat16.compute_in_bfloat16()
    assert not torch.equal(found, exact)
    assert (found - own).norm() <= 0.02 * own.norm()
