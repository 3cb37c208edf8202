"""Where a model can come from, by its name, a folder or the Hub; and what is said where it cannot."""

import json

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


@pytest.mark.parametrize(
    "values", [(1.0, 1.0), (0.2, 0.0, 0.2), (0.2, float("nan"), 0.2), (1e-320,) * 3, (10**400,) * 3]
)
def test_bad_std_is_an_error(values):
    with pytest.raises(InputError, match="--std must be three numbers above 0"):
        load_model("mobilenetv2_cifar", pretrained=False, std=values)


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match="no model folder"):
        load_model(f"local-dir:{tmp_path / 'none'}")


def test_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("made", [("student", "teacher"), ("teacher",)])
def test_folder_of_a_run_names_its_models(model, tmp_path, made):
    for name in made:
        save_model(model, tmp_path / "run" / name)
    names = " or ".join(f"local-dir:{tmp_path / 'run' / name}" for name in made)
    with pytest.raises(MissingFileError) as raised:
        load_model(f"local-dir:{tmp_path / 'run'}")
    assert str(raised.value).endswith(f"run' is a run's folder, which holds its models; write {names}")
    with pytest.raises(InputError) as raised:
        load_model(str(tmp_path / "run"))
    assert str(raised.value).endswith(f"run' is a folder; write {names}")
    for name in str(raised.value).split("write ")[1].split(" or "):
        assert load_model(name).num_classes == 10


def test_folder_of_a_model_is_no_run_whatever_else_it_holds(model, tmp_path):
    save_model(model, tmp_path / "mine")
    save_model(model, tmp_path / "mine" / "student")
    assert load_model(f"local-dir:{tmp_path / 'mine'}").num_classes == 10
    with pytest.raises(InputError, match=r"is a folder; write local-dir:.*/mine$"):
        load_model(str(tmp_path / "mine"))


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_file_of_a_models_folder_names_the_folder(model, tmp_path, prefix, file):
    save_model(model, tmp_path / "student")
    with pytest.raises(InputError, match=r"is a file of a model's folder; write local-dir:") as raised:
        load_model(f"{prefix}{tmp_path / 'student' / file}")
    assert load_model(str(raised.value).split("write ")[1]).num_classes == 10


@pytest.mark.parametrize(("role", "flag"), [("teacher", "--teacher-checkpoint"), ("model", "--checkpoint")])
@pytest.mark.parametrize("name", ["{}/weights.safetensors", "weights.safetensors", "local-dir:{}/weights.safetensors"])
def test_file_of_weights_alone_belongs_beside_a_timm_name(name, role, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"is a file; name the timm model .* give it by {flag} .*weights\.safetensors$"
    ):
        load_model(name.format(tmp_path), role=role)


def test_timm_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_resnet").mkdir()
    assert load_model("test_resnet", pretrained=False).num_classes == 1000


@pytest.mark.parametrize("spec", ["a/" + "x" * 300, "local-dir:" + "x" * 300])
def test_name_longer_than_a_path_may_be_is_unknown(spec):
    with pytest.raises((InputError, MissingFileError), match="x"):
        load_model(spec)


SIZED = {
    "of the model": ("test_vit", {"img_size": 50}, "50 x 50"),
    "two sides": ("test_vit", {"img_size": (48, 50)}, "48 x 50"),
    "of what is cut": ("igkd_truncated", {"base": "test_vit", "drop": 1, "base_args": {"img_size": 50}}, "50 x 50"),
}


@pytest.mark.parametrize("case", SIZED)
def test_arguments_of_a_size_that_the_model_cannot_read_are_refused_when_it_is_loaded(case):
    name, arguments, size = SIZED[case]
    message = rf"cannot read images of {size} pixels \(.*divisible.*\); choose another img_size in --teacher-args$"
    with pytest.raises(InputError, match=message):
        load_model(name, model_args=arguments, pretrained=False, role="teacher")


@pytest.mark.parametrize(("role", "flag"), [("teacher", "--teacher-args"), ("model", "--model-args")])
@pytest.mark.parametrize("name", ["resnet20_cifar", "test_resnet"])
def test_arguments_of_a_model_that_can_be_built_but_not_run_are_refused_when_it_is_loaded(name, role, flag):
    arguments = {"global_pool": "", "num_classes": 3}
    with pytest.raises(InputError, match=rf"{name}' cannot read images of .* pixels \(.*\); correct {flag}$"):
        load_model(name, model_args=arguments, pretrained=False, role=role)
    with pytest.raises(InputError, match=rf"32 x 32 pixels \(.*\); choose another --img-size, or correct {flag}$"):
        load_model(name, model_args=arguments, pretrained=False, role=role, img_size=32)


def test_a_folder_whose_model_can_be_built_but_not_run_is_refused(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=3), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_args": {"global_pool": ""}}))
    for more in ({}, {"pretrained": False}):
        message = r"cannot read images of 160 x 160 pixels \(.*\); correct --student-args or its config\.json$"
        with pytest.raises(InputError, match=message):
            load_model(f"local-dir:{tmp_path / 'model'}", role="student", **more)


def test_arguments_of_a_size_that_it_reads_are_kept():
    model = load_model("test_vit", model_args={"img_size": 48, "in_chans": 1}, pretrained=False)
    assert model.pretrained_cfg["input_size"][1:] == (48, 48)


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
    weights = tmp_path / "student" / "model.safetensors"
    for spec in ("test_resnet", "local-dir:~/student"):
        assert start_files(spec, "~/student/model.safetensors")[-1] == start_files(spec, weights)[-1] == weights


def test_a_model_of_one_channel_is_none_of_another_size():
    assert load_model("test_resnet", pretrained=False, model_args={"in_chans": 1}, img_size=32).in_chans == 1
