"""Models saved and reloaded with equal outputs, hashed and counted."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from model_parts import SMALL
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from timm_igkd.errors import InputError, RunError
from timm_igkd.models import loading as model_loading
from timm_igkd.models.loading import count_macs, count_parameters, load_model, needs_plugin, save_model, weights_hash
from timm_igkd.models.output_names import output_names


@pytest.mark.parametrize("name", ["mobilenetv2_cifar", "test_resnet", "test_vit"])
def test_saved_model_gives_equal_outputs_through_timm(name, tmp_path):
    saved = timm.create_model(name, num_classes=5).eval()
    x = torch.rand(2, *saved.pretrained_cfg["input_size"])
    save_model(saved, tmp_path / "student")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    assert torch.equal(saved(x), reloaded(x))


def test_saved_folder_holds_safetensors_only(model, tmp_path):
    save_model(model, tmp_path / "deep" / "student")
    assert sorted(f.name for f in (tmp_path / "deep" / "student").iterdir()) == ["config.json", "model.safetensors"]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["student"]


def test_labels_and_normalisation_survive_saving(model, tmp_path):
    names = [f"class {i}" for i in range(10)]
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), label_descriptions={"old": "label"})
    save_model(model, tmp_path / "student", label_names=names)
    cfg = load_model(f"local-dir:{tmp_path / 'student'}").pretrained_cfg
    assert (cfg["label_names"], tuple(cfg["mean"])) == (names, (0.1, 0.2, 0.3))
    assert "label_descriptions" not in cfg
    assert "label_descriptions" in model.pretrained_cfg


def test_another_head_than_the_folders_has_no_names_of_its_classes(model, tmp_path):
    save_model(model, tmp_path, label_names=[f"class {i}" for i in range(10)])
    save_file(
        timm.create_model("mobilenetv2_cifar", num_classes=5, **SMALL).state_dict(), tmp_path / "five.safetensors"
    )
    for options in ({}, {"pretrained": False}, {"checkpoint": tmp_path / "five.safetensors"}):
        found = load_model(f"local-dir:{tmp_path}", num_classes=5, **options)
        assert output_names(found) == ({}, False)
    assert len(output_names(load_model(f"local-dir:{tmp_path}", num_classes=10))[0]) == 10


def test_the_folders_own_head_keeps_its_names_where_some_outputs_have_none(model, tmp_path):
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": {"0": "cat", "2": "dog"}}))
    for arguments in ({}, {"num_classes": 10}):
        assert output_names(load_model(f"local-dir:{tmp_path}", **arguments))[0] == {"cat": 0, "dog": 2}


def test_others_may_read_the_weights_where_they_may_read_the_config(model, tmp_path):
    save_model(model, tmp_path / "student")
    modes = {path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert len(modes) == 1


def test_channels_last_model_can_be_saved(model, tmp_path):
    expected = weights_hash(model)
    save_model(model.to(memory_format=torch.channels_last), tmp_path / "student")
    assert weights_hash(load_model(f"local-dir:{tmp_path / 'student'}")) == expected


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, AveragedModel])
def test_a_wrapped_model_is_saved_and_known_as_the_one_inside(model, wrap, images, tmp_path):
    wrapped = wrap(model)
    save_model(wrapped, tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(model.state_dict())
    assert torch.equal(load_model(f"local-dir:{tmp_path / 'model'}")(images), model(images))
    assert weights_hash(wrapped) == weights_hash(model)
    assert count_macs(wrapped) == count_macs(model)


def test_truncated_checkpoint_restores_the_model(tmp_path):
    arguments = {"base": "test_vit", "base_args": {"img_size": 96}, "drop": 3, "num_classes": 5}
    saved = timm.create_model("igkd_truncated", **arguments)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("igkd_truncated", model_args=arguments, checkpoint=tmp_path / "weights.safetensors")
    assert weights_hash(loaded) == weights_hash(saved)


def test_saving_again_keeps_other_files(model, tmp_path):
    save_model(model, tmp_path)
    (tmp_path / "README.md").write_text("card")
    other = timm.create_model("mobilenetv2_cifar", **SMALL)
    save_model(other, tmp_path)
    assert weights_hash(load_model(f"local-dir:{tmp_path}")) == weights_hash(other)
    assert (tmp_path / "README.md").read_text() == "card"


def test_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    def full_disk(view, folder, **kwargs):
        Path(folder).mkdir(exist_ok=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_loading, "save_for_hf", full_disk)
    with pytest.raises(RunError, match="No space left"):
        save_model(model, tmp_path / "student")
    assert not list(tmp_path.iterdir())
    assert not model._state_dict_hooks


def test_interrupted_overwrite_does_not_look_complete(model, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    save_model(model, tmp_path / "student")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(RunError, match="No space left"):
        save_model(model, tmp_path / "student")
    assert not (tmp_path / "student" / "config.json").exists()


def test_label_names_must_match_the_outputs(model, tmp_path):
    with pytest.raises(InputError, match="expected 10 different label names"):
        save_model(model, tmp_path, label_names=["a"] * 10)


def test_plugin_is_needed_for_its_own_architectures_only(model):
    assert needs_plugin(model)
    assert not needs_plugin(timm.create_model("test_resnet"))


def test_hash_follows_weights_and_dtypes(model):
    first = weights_hash(model)
    assert weights_hash(copy.deepcopy(model).train()) == first
    assert weights_hash(copy.deepcopy(model).to(torch.bfloat16)) != first
    with torch.no_grad():
        model.classifier[1].bias[0] += 1
    assert weights_hash(model) != first


def test_macs_of_a_linear_layer_are_counted():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).train()
    model.pretrained_cfg = {"input_size": (3, 2, 2)}
    assert count_macs(model) == 60
    assert model.training
    assert count_parameters(model) == 65


@pytest.mark.shared
def test_shared_imagenet_teacher_loads(shared):
    folder = shared / "weights/mobilenetv2_100.coral_in1k"
    model = load_model(f"local-dir:{folder}", role="teacher")
    assert json.loads((folder / "config.json").read_text())["num_classes"] == model.num_classes == 1000
