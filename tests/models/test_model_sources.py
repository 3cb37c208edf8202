"""Where a model can come from, by its name, a folder or the Hub; and what is said where it cannot."""

import pytest
import timm
from huggingface_hub import errors as hub_errors
from model_parts import SMALL

from timm_igkd.errors import InputError, MissingFileError, RunError
from timm_igkd.models import loading as model_loading
from timm_igkd.models.checkpoint import start_files
from timm_igkd.models.loading import load_model, save_model


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
    [("{", "is not JSON"), ("{}", "names no architecture"), ('{"architecture": "resnet81"}', "did you mean")],
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


def test_the_home_folder_is_found_behind_local_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "student")
    assert load_model("local-dir:~/student").num_classes == 2
    assert start_files("local-dir:~/student") == start_files(f"local-dir:{tmp_path / 'student'}") != []


def test_a_model_of_one_channel_is_none_of_another_size():
    assert load_model("test_resnet", pretrained=False, model_args={"in_chans": 1}, img_size=32).in_chans == 1
