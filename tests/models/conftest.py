"""A small network of the paper, images for it, and its weights in a file."""

from pathlib import Path

import pytest
import timm
import torch
from model_parts import SMALL
from safetensors.torch import save_file


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv2_cifar", **SMALL).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"
