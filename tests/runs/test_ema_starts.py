"""A checkpoint of timm's that holds weights and their moving average: a run takes those that it is told to."""

import pytest
import torch
from command_lines import two_splits
from tiny_parts import tiny_teacher
from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.models import RunModels
from timm_igkd.runs.settings import RunConfig


def first_weight(model: nn.Module) -> torch.Tensor:
    return next(iter(model.state_dict().values()))


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
