"""The allocator's settings: changed once by a process of our own, never by a library call."""

import types

import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.cli import freed_memory
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.maps.build import compute_maps


@pytest.mark.parametrize("n_steps", [2, "auto"])
def test_engine_leaves_the_allocator_of_its_host_alone(n_steps, allocator_settings):
    teacher, inputs = tiny_teacher(classes=3, size=16), torch.rand(2, 3, 16, 16)
    engine = FastEngine(teacher, IGOptions(n_steps=n_steps, max_steps=8), 4, (3, 16, 16), workers=2)
    engine.attribute(inputs, torch.zeros_like(inputs[:1]), torch.tensor([0, 1]), engine.forward(inputs))
    assert allocator_settings == []


def test_building_maps_from_python_leaves_the_allocator_alone(allocator_settings, tmp_path):
    images = ImageList([noise_image(seed) for seed in range(2)], [0, 1], name="noise")
    compute_maps(tiny_teacher(classes=3, size=16), images, tmp_path, options=IGOptions(n_steps=2), progress=False)
    assert allocator_settings == []


def test_allocator_is_told_once(allocator_settings):
    keep_freed_memory()
    told = list(allocator_settings)
    keep_freed_memory()
    assert allocator_settings == told
    assert len(told) == len(dict(told)) == 4


def test_system_without_mallopt_is_left_alone(allocator_settings, monkeypatch):
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    keep_freed_memory()
    assert allocator_settings == []
