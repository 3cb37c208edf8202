"""Images and their maps for scripts that are run."""

from pathlib import Path

import pytest
from run_command_parts import image_folder, ramp_store


@pytest.fixture
def folder(tiny_images) -> Path:
    return image_folder(tiny_images)


@pytest.fixture
def maps(folder, tmp_path) -> Path:
    return ramp_store(tmp_path / "maps", "", folder)
