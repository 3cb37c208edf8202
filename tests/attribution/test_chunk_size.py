"""Chunk sizes: a rule of the net's layers and activations, so that two builds agree."""

import pytest
import timm
import torch
from torch import nn

from timm_igkd.attribution.chunk_size import activation_chunk

CPU = torch.device("cpu")


def chunk_of(name: str, size: int) -> int:
    return activation_chunk(timm.create_model(name).eval(), (3, size, size), CPU)


def test_small_activations_share_a_large_chunk():
    assert chunk_of("test_resnet", 32) == 128


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet26", "tf_mobilenetv3_large_100"])
def test_nets_with_pointwise_convolutions_get_chunks_that_onednn_takes(name):
    assert chunk_of(name, 224) >= 16


def test_nets_without_them_may_have_smaller_chunks():
    model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 8, 1, stride=2))
    assert activation_chunk(model, (3, 224, 224), CPU) == 8
    pointwise = nn.Sequential(*model, nn.Conv2d(8, 8, 1))
    assert activation_chunk(pointwise, (3, 224, 224), CPU) == 16


def test_images_of_one_pair_each_leave_a_chunk_for_every_thread():
    model = timm.create_model("test_resnet").eval()
    assert activation_chunk(model, (3, 32, 32), CPU) == 128
    assert activation_chunk(model, (3, 32, 32), CPU, has_paths=False) == 16
