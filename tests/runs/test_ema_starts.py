"""The checkpoint that a run starts from: found in the home folder; of weights and moving average those asked for."""

import pytest
import safetensors.torch
import torch
from command_lines import two_splits
from tiny_parts import tiny_teacher
from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.files import hash_files
from timm_igkd.runs.checks import check_checkpoint
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder, RunInputs
from timm_igkd.runs.models import RunModels
from timm_igkd.runs.settings import RunConfig


def first_weight(model: nn.Module) -> torch.Tensor:
    return next(iter(model.state_dict().values()))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_checkpoint_in_the_home_folder_is_found(name, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tiny_teacher(classes=1000, size=16, seed=3).state_dict(), weights)
    config = RunConfig(
        protocol="demo",
        dataset=str(two_splits(tiny_images)),
        validation_split=None,
        **{name: "test_resnet", f"{name}_init": "pretrained", f"{name}_checkpoint": "~/weights.safetensors"},
    )
    check_checkpoint(config, name)
    folder, data = RunFolder(tmp_path / "run"), RunData(config)
    models = RunModels(config, data, folder)
    found = models.teacher() if name == "teacher" else models.student(lambda: nn.Identity())
    assert torch.equal(first_weight(found), safetensors.torch.load_file(weights)["conv1.0.weight"])
    assert RunInputs(config, data, folder).of(name)[f"{name}'s files"] == hash_files([weights])


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_run_takes_the_weights_it_is_told_to(name, use_ema, tiny_images, tmp_path):
    raw, averaged = (tiny_teacher(seed=seed) for seed in (5, 6))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "both.pth.tar")
    options = {"checkpoint": tmp_path / "both.pth.tar", "use_ema": use_ema, "args": {"num_classes": 2}}
    config = RunConfig(
        protocol="demo",
        dataset=str(two_splits(tiny_images)),
        validation_split=None,
        **{name: "test_resnet", f"{name}_init": "pretrained"},
        **{f"{name}_{option}": value for option, value in options.items()},
    )
    models = RunModels(config, RunData(config), RunFolder(tmp_path / "run"))
    found = models.teacher() if name == "teacher" else models.student(lambda: nn.Identity())
    assert torch.equal(first_weight(found), first_weight(averaged if use_ema else raw))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_ema_weights_of_no_checkpoint_are_refused(name):
    with pytest.raises(InputError, match=f"{name}_use_ema is of a checkpoint; give --{name}-checkpoint, or drop it"):
        RunConfig(protocol="demo", **{f"{name}_use_ema": True})
