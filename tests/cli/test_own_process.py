"""Commands and recipes that compute maps keep freed memory: their process is their own."""

import pytest
from command_lines import run_in_process
from tiny_parts import tiny_teacher

import study
import train_igkd
from timm_igkd.cli import freed_memory
from timm_igkd.models.loading import save_model


def test_commands_keep_freed_memory_where_they_compute_maps(
    command, tiny_images, tmp_path, allocator_settings, monkeypatch
):
    save_model(tiny_teacher(classes=2, size=16), tmp_path / "teacher")
    images = ["--dataset", tiny_images(), "--split", "train"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    assert command("maps", *teacher, *images, "--n-steps", 2, "--out", tmp_path / "maps").code == 0
    assert allocator_settings
    allocator_settings.clear()
    monkeypatch.setattr(freed_memory, "_kept", False)  # as in a process of its own
    assert command("verify", "--maps", tmp_path / "maps", *images).code == 0
    assert not allocator_settings
    assert command("verify", "--maps", tmp_path / "maps", *images, *teacher, "--recompute", 2).code == 0
    assert allocator_settings


@pytest.mark.parametrize("recipe", [train_igkd, study], ids=["train_igkd", "study"])
def test_recipes_keep_freed_memory(recipe, capsys, allocator_settings):
    assert run_in_process(recipe.main, ["--no-such-setting", "1"], capsys).code == 2
    assert allocator_settings
