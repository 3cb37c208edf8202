import argparse
import copy
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from timm_igkd.errors import InputError, MissingFileError, RunError
from timm_igkd.models import loading as model_loading
from timm_igkd.models.loading import (
    count_macs,
    count_parameters,
    load_model,
    needs_plugin,
    save_model,
    weights_hash,
)
from timm_igkd.models.output_names import class_indices

SHARED = Path(os.environ.get("TIMM_IGKD_SHARED", Path(__file__).parents[3] / "shared"))
SMALL = {"drop_blocks": 16}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv2_cifar", **SMALL).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


class Evil:
    """Pickled code: reading it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# ---- saving and reloading


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


def test_others_may_read_the_weights_where_they_may_read_the_config(model, tmp_path):
    save_model(model, tmp_path / "student")
    modes = {path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert len(modes) == 1


def test_channels_last_model_can_be_saved(model, tmp_path):
    expected = weights_hash(model)
    save_model(model.to(memory_format=torch.channels_last), tmp_path / "student")
    assert weights_hash(load_model(f"local-dir:{tmp_path / 'student'}")) == expected


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


# ---- checkpoints


def test_checkpoint_restores_the_model(model, checkpoint, images):
    loaded = load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=checkpoint)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert "state_dict" not in loaded.pretrained_cfg


def test_timm_checkpoint_gives_plain_or_ema_weights(model, images, tmp_path):
    ema = timm.create_model("mobilenetv2_cifar", **SMALL).eval()
    content = {"state_dict": model.state_dict(), "state_dict_ema": ema.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "last.pth.tar")
    for use_ema, expected in ((False, model), (True, ema)):
        loaded = load_model(
            "mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "last.pth.tar", use_ema=use_ema
        )
        assert torch.equal(loaded(images), expected(images))


def test_split_tensor_names_are_joined(model, tmp_path):
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("features.0.", "front_layers.0.").replace("features.1.", "middle_layer.")
        renamed[name.replace("features.2.", "end_layers.0.")] = tensor
    save_file(renamed, tmp_path / "split.safetensors")
    loaded = load_model("mobilenetv2_cifar", model_args=SMALL, checkpoint=tmp_path / "split.safetensors")
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


# ---- what to load


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet19", r"unknown model 'resnet19' \(did you mean 'resnet18'\?\)"),
        ("resnet18.a1_in2k", r"unknown pretrained tag .*did you mean 'resnet18.a1_in1k'"),
        ("timm/resnet18", "write local-dir:timm/resnet18 or hf-hub:timm/resnet18"),
        ("s3:bucket", "neither a timm name nor hf-hub:"),
    ],
)
def test_unknown_model_offers_a_remedy(spec, message):
    with pytest.raises(InputError, match=message):
        load_model(spec)


@pytest.mark.parametrize(("role", "flag"), [("teacher", "--teacher-checkpoint"), ("model", "--checkpoint")])
def test_model_without_weights_asks_for_a_checkpoint(role, flag):
    with pytest.raises(InputError, match=f"no pretrained weights for 'mobilenetv2_cifar'; give {flag} "):
        load_model("mobilenetv2_cifar", role=role)


def test_random_weights_on_request():
    assert load_model("mobilenetv2_cifar", model_args=SMALL, pretrained=False, num_classes=3).num_classes == 3


def test_unknown_model_argument_is_named():
    with pytest.raises(InputError, match=r"'drop_block'.*--teacher-args"):
        load_model("mobilenetv2_cifar", model_args={"drop_block": 1}, pretrained=False, role="teacher")


def test_normalisation_can_be_replaced():
    model = load_model("mobilenetv2_cifar", pretrained=False, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == ((0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.2, 0.0, 0.2), (0.2, float("nan"), 0.2)])
def test_bad_std_is_an_error(values):
    with pytest.raises(InputError, match="--std must be three numbers above 0"):
        load_model("mobilenetv2_cifar", pretrained=False, std=values)


# ---- folders and the Hub


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match="no model folder"):
        load_model(f"local-dir:{tmp_path / 'none'}")


def test_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        load_model(f"local-dir:{tmp_path}")


def test_folder_without_weights_is_an_error(model, tmp_path):
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"no weights; expected model\.safetensors"):
        load_model(f"local-dir:{tmp_path}")


def test_folder_with_cut_weights_is_an_error(model, tmp_path):
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(InputError, match="corrupt"):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "names no architecture"), ("{}", "names no architecture"), ('{"architecture": "resnet81"}', "did you mean")],
)
def test_folder_with_a_bad_config_is_an_error(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "is gated"),
        (hub_errors.RepositoryNotFoundError, "does not exist, or is private"),
        (hub_errors.RevisionNotFoundError, "no such revision"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.OfflineModeIsEnabled, "offline mode"),
        (hub_errors.RemoteEntryNotFoundError, r"no timm config\.json"),
        (hub_errors.HfHubHTTPError, "the Hub's answer"),
        (ConnectionError, "check the network"),
    ],
)
def test_hub_failure_is_one_line_without_the_token(error, message, monkeypatch):
    def fail(*args, **kwargs):
        failure = error.__new__(error)
        failure.args = ("Authorization: Bearer hf_secret\nand more",)
        raise failure

    monkeypatch.setattr(model_loading, "fetch_folder", fail)
    with pytest.raises(RunError, match=message) as caught:
        load_model("hf-hub:user/name")
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hf-hub:a b/c", "hf-hub:a/b/c/d"])
def test_bad_hub_id_is_an_error(spec):
    with pytest.raises(InputError, match="is no name of a repository"):
        load_model(spec)


# ---- classes


def with_labels(names, num_classes=3):
    model = timm.create_model("mobilenetv2_cifar", num_classes=num_classes, **SMALL)
    model.pretrained_cfg["label_names"] = names
    return model


def test_same_classes_need_no_indices():
    assert class_indices(with_labels(["a", "b", "c"]), ["a", "b", "c"], 3) is None


@pytest.mark.parametrize("names", [(None, ["a", "b", "c"]), (["a", "b", "c"], None), (None, None)])
def test_unnamed_classes_of_the_same_number_need_no_indices(names):
    assert class_indices(with_labels(names[0]), names[1], 3) is None


def test_permuted_classes_are_found_by_name():
    assert class_indices(with_labels(["a", "b", "c"]), ["c", "a", "b"], 3) == [2, 0, 1]


def test_subset_of_classes_is_found_by_name():
    assert class_indices(with_labels(["a", "b", "c"]), ["c", "b"], 2) == [2, 1]


def test_label_dictionary_is_read():
    assert class_indices(with_labels({"0": "a", "2": "c"}), ["c"], 1) == [2]


def test_imagenet_classes_are_found_by_wordnet_id():
    model = timm.create_model("test_resnet", num_classes=1000)
    assert class_indices(model, ["n01440764", "n02102040"], 2) == [0, 217]


@pytest.mark.parametrize(
    ("labels", "class_names", "num_classes"),
    [(["a", "b", "c"], ["a", "x"], 2), (["a", "b", "c"], ["a", "b", "x"], 3), (None, ["a", "b"], 2), (None, None, 4)],
)
def test_other_classes_are_an_error(labels, class_names, num_classes):
    with pytest.raises(InputError, match=f"the model has 3 classes.*the dataset has {num_classes}; use a model"):
        class_indices(with_labels(labels), class_names, num_classes)


# ---- counting


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
def test_shared_imagenet_teacher_loads():
    folder = SHARED / "weights/mobilenetv2_100.coral_in1k"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}; set TIMM_IGKD_SHARED")
    model = load_model(f"local-dir:{folder}", role="teacher")
    assert json.loads((folder / "config.json").read_text())["num_classes"] == model.num_classes == 1000
