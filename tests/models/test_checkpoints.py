"""Checkpoint files: timm's and others', damaged, of another architecture, with code in them."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from model_parts import SMALL
from safetensors.torch import save_file

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.models.loading import load_model, weights_hash


class Evil:
    """Pickled code: reading it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_checkpoint_restores_the_model(model, checkpoint, images):
    loaded = load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=checkpoint)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert "state_dict" not in loaded.pretrained_cfg


def test_timm_checkpoint_gives_plain_or_ema_weights(model, images, tmp_path, capsys):
    ema = timm.create_model("mobilenetv2_cifar", **SMALL).eval()
    content = {"state_dict": model.state_dict(), "state_dict_ema": ema.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "last.pth.tar")
    for use_ema, expected in ((False, model), (True, ema)):
        loaded = load_model(
            "mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "last.pth.tar", use_ema=use_ema
        )
        assert torch.equal(loaded(images), expected(images))
    load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "last.pth.tar")
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1  # once a file
    assert notes[0].endswith("holds weights and their moving average (EMA); the weights are taken, --use-ema takes it")


def test_split_tensor_names_are_joined(model, tmp_path):
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("features.0.", "front_layers.0.").replace("features.1.", "middle_layer.")
        renamed[name.replace("features.2.", "end_layers.0.")] = tensor
    save_file(renamed, tmp_path / "split.safetensors")
    loaded = load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "split.safetensors")
    assert weights_hash(loaded) == weights_hash(model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_names_that_a_wrapper_gave_are_those_of_the_model(model, prefix, suffix, tmp_path):
    renamed = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    file = tmp_path / f"wrapped.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(renamed, file)
    loaded = load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=file)
    assert weights_hash(loaded) == weights_hash(model)


def test_missing_ema_weights_are_an_error(model, tmp_path):
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    with pytest.raises(InputError, match="no EMA weights"):
        load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "last.pth.tar", use_ema=True)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Evil(tmp_path / "hacked")}, tmp_path / "evil.pth.tar")
    with pytest.raises(InputError, match=r"holds pickled code \(.*mkdir\), never run; save its weights as safetensors"):
        load_model("mobilenetv2_cifar", checkpoint=tmp_path / "evil.pth.tar")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pth"])
@pytest.mark.parametrize("content", [b"", b"xx", b"PK\x03\x04"])
def test_corrupt_checkpoint_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}' .*(corrupt|no PyTorch)"):
        load_model("mobilenetv2_cifar", checkpoint=tmp_path / name)


def test_missing_checkpoint_names_file_and_flag(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.pth' \(--teacher-checkpoint\)"):
        load_model("mobilenetv2_cifar", checkpoint=tmp_path / "none.pth", role="teacher")


def test_wrong_architecture_is_an_error(checkpoint):
    with pytest.raises(InputError, match=r"do not fit model 'mobilenetv2_cifar' \(Missing key"):
        load_model("mobilenetv2_cifar", checkpoint=checkpoint)


def test_wrong_number_of_classes_names_the_right_one(checkpoint):
    with pytest.raises(InputError, match=r"do not fit .*; give .* --teacher-args, for instance num_classes=10"):
        load_model("mobilenetv2_cifar", model_args=SMALL, num_classes=3, checkpoint=checkpoint, role="teacher")
