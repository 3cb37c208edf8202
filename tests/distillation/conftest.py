"""A batch of noise."""

import pytest
import torch
from task_parts import BATCH
from torch import Tensor


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 32, 32, generator=rng), torch.arange(BATCH)
