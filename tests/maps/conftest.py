"""A teacher, its images and their store, built once for each file of tests."""

import shutil
from pathlib import Path

import pytest
from store_parts import N, build
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import nn

from timm_igkd.maps.store import MapStore


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_teacher(classes=3, size=16)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return ImageList([noise_image(seed) for seed in range(N)], [index % 3 for index in range(N)], name="noise")


@pytest.fixture(scope="module")
def built(teacher, images, tmp_path_factory) -> MapStore:
    """A store that no test alters."""
    store = build(teacher, images, tmp_path_factory.mktemp("built") / "maps", logits=True)
    assert store is not None
    return store


@pytest.fixture
def copied(built, tmp_path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(built.path, tmp_path / "copied"))
