"""Folded batch norms: equal outputs, and no folding where they would change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attribution_parts import images_in
from timm.layers import ScaledStdConv2d
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd.attribution.lighter_model import lighter_model
from timm_igkd.attribution.options import CaptumEngine, IGOptions
from timm_igkd.models.loading import weights_hash


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "mobilenetv2_050", "regnetx_002"])
def test_folding_keeps_the_outputs_and_removes_batch_norms(name):
    model = tiny_teacher(name, classes=5)
    before = weights_hash(model)
    inputs = images_in(model, 4)
    folded = lighter_model(model, inputs[:1])
    assert batch_norms(model) > 0
    assert batch_norms(folded) == 0
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(folded(inputs), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert weights_hash(model) == before


class Refused(nn.Module):
    """A batch norm after a convolution that must not be folded into it."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.conv = ScaledStdConv2d(3, 4, 3) if kind == "standardised" else nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "activation between":
            return self.norm(self.act(x)).mean((2, 3))
        if self.kind == "output used twice":
            return (self.norm(x) + x).mean((2, 3))
        return self.norm(x).mean((2, 3))


@pytest.mark.parametrize("kind", ["standardised", "activation between", "output used twice"])
def test_folding_that_would_change_the_outputs_is_refused(kind):
    model, inputs = Refused(kind).eval(), torch.rand(2, 3, 8, 8)
    folded = lighter_model(model, inputs[:1])
    assert batch_norms(folded) == 1
    assert torch.equal(folded(inputs), model(inputs))


class Transposed(nn.Module):
    """A batch norm whose gradient comes transposed, as that of tokens does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).tanh().mean(1)


def test_a_batch_norm_before_tokens_is_folded():
    assert batch_norms(lighter_model(Transposed().eval(), torch.rand(1, 3, 8, 8))) == 0


def test_captum_gives_the_same_for_one_pair_at_a_time_as_for_all_at_once():
    model, inputs = Transposed().eval(), torch.rand(1, 3, 8, 8)
    target = torch.tensor([2])
    one, some, together = (
        CaptumEngine(model, IGOptions(n_steps=7), chunk).attribute(inputs, torch.zeros(1, 3, 8, 8), target, target)
        for chunk in (1, 3, None)
    )
    for found in (one, some):
        torch.testing.assert_close(found.values, together.values, rtol=1e-4, atol=1e-6)


class ReadsItsLayers(nn.Module):
    """A forward that reads an attribute of a layer, which what stands in for the layer lacks."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.norm.running_var.uniform_(0.2, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))).mean((2, 3)) * float(self.read(self))


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.norm.weight.detach().abs().mean(),
        lambda model: model.norm.eps + 1,
        lambda model: model.norm.num_features,
        lambda model: model.act.inplace,
        lambda model: len(list(model.norm.parameters())),
    ],
    ids=["weight", "eps", "num_features", "inplace", "parameters"],
)
def test_a_model_that_reads_its_layers_keeps_its_outputs(read):
    model, inputs = ReadsItsLayers(read).eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(lighter_model(model, inputs[:1])(inputs), model(inputs), rtol=1e-3, atol=1e-5)
