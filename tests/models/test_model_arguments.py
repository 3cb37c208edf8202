"""A model is built from its architecture's arguments alone; a config from elsewhere fetches and crashes nothing."""

import json

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import timm_igkd  # noqa: F401  (registers the models)
from timm_igkd.errors import InputError
from timm_igkd.models.arguments import check_model_arguments, model_data_config
from timm_igkd.models.folder_config import check_preprocessing
from timm_igkd.models.loading import load_model, save_model
from timm_igkd.models.output_names import check_reads_colour

URL = "https://example.com/weights.pth"
BASE = {"base": "test_resnet", "drop": 1}


@pytest.fixture
def folder(tmp_path):
    """A saved truncated student."""
    torch.manual_seed(0)
    model = timm.create_model("igkd_truncated", base="test_resnet", base_args={}, drop=1, num_classes=3).eval()
    save_model(model, tmp_path / "student")
    return tmp_path / "student"


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to fetch fails the test."""

    def fetch(*args, **kwargs):
        raise AssertionError(f"fetched {args} {kwargs}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fetch, raising=False)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch, raising=False)


ATTACKS = [
    {"pretrained": True},
    {"pretrained": True, "pretrained_cfg": {"url": URL}},
    {"pretrained_cfg": {"url": URL}},
    {"pretrained_cfg_overlay": {"url": URL}},
    {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
    {"checkpoint_path": "/etc/passwd"},
    {"cache_dir": "/tmp"},
    {"features_only": True},
    {"stem_type": URL},
    {"block_args": [{"url": "x"}]},
    {"stem_type": "hf-hub:user/name"},
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: next(iter(attack)))
@pytest.mark.parametrize("depth", [0, 1])
def test_config_of_a_student_fetches_nothing(attack, depth, folder, no_network):
    inner = attack if depth == 0 else {"base": "test_resnet", "drop": 1, "base_args": attack}

    def change(config):
        config["model_args"]["base_args"] = inner
        if depth:
            config["model_args"]["base"] = "igkd_truncated"

    edit(folder, change)
    with pytest.raises(InputError, match="base_args"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(InputError, match="base_args"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: next(iter(attack)))
def test_arguments_of_a_command_are_those_of_the_architecture(attack, no_network):
    with pytest.raises(InputError, match="--teacher-args"):
        load_model("test_resnet", model_args=attack, pretrained=False, role="teacher")


@pytest.mark.parametrize("found", [7, 0, -3, 3.5, "3", True, [3]])
@pytest.mark.parametrize("place", ["config", "model_args"])
def test_number_of_classes_that_is_not_the_weights_is_refused(place, found, folder):
    """Timm puts a classifier of random weights there, without a word."""
    edit(folder, lambda config: config.get(place, config).update(num_classes=found))
    with pytest.raises(InputError, match=r"config\.json in .*: num_classes must be one whole number"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_data_set_decides_the_number_of_classes(role):
    with pytest.raises(InputError, match=rf"--{role}-args has num_classes=7, but the data set decides, which has 3"):
        load_model("test_resnet", model_args={"num_classes": 7}, num_classes=3, pretrained=False, role=role)


def test_model_of_grey_images_is_refused_where_colour_is_fed():
    model = load_model("test_resnet", model_args={"in_chans": 1}, pretrained=False)
    with pytest.raises(InputError, match="the teacher must read colour images, 3 channels, got one of 1"):
        check_reads_colour(model, "teacher")


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.0, "0.1", True, [0.1]])
def test_rates_outside_their_range_are_refused(value):
    with pytest.raises(InputError, match=r"drop_rate must be in \[0, 1\)"):
        load_model("test_resnet", model_args={"drop_rate": value}, pretrained=False)


def test_ordinary_arguments_pass():
    model = load_model("test_vit", model_args={"img_size": [96, 96], "drop_rate": 0.1}, pretrained=False)
    assert model(torch.rand(1, 3, 96, 96)).ndim == 2
    check_model_arguments({"base": "test_vit", "base_args": {"block_args": {"x": [1, 2.0, None, "avg"]}}}, "here")


@pytest.mark.parametrize("name", ["test_vit", "efficientvit_m0", "mixer_s32_224"])  # read differently by their networks
def test_the_size_that_a_model_is_built_for_is_that_of_its_images(name, tmp_path):
    size = (3, 64, 64)
    model = timm.create_model(name, img_size=64, num_classes=2).eval()
    assert model_data_config(model)["input_size"] == size
    save_model(model, tmp_path / "saved")
    found = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert tuple(resolve_model_data_config(found)["input_size"]) == size  # what a user of timm asks
    image = torch.rand(1, *size)
    assert torch.equal(found(image), model(image))
    loaded = load_model(name, model_args={"img_size": 64}, pretrained=False)
    assert tuple(resolve_model_data_config(loaded)["input_size"]) == size


def test_deep_nesting_is_refused():
    nested: dict = {}
    for _ in range(50):
        nested = {"a": nested}
    with pytest.raises(InputError, match="nested more than 8 deep"):
        check_model_arguments(nested, "here")


HUGE = 10**400  # more than a float holds
WRONG = {
    "mean": [
        *(None, ["a", 0, 0], [], "0.5", [0.5, float("nan"), 0.5], {"r": 1}),
        *([0.5, 0.5], [0.5] * 4, [1e39, 0, 0], [-1e300], [HUGE, 0, 0]),
    ],
    "std": [None, [0, 1, 1], [1, -1, 1], "x", [1, 1], [1e-320] * 3, [1e-40], [1e39] * 3, [HUGE]],
    "input_size": [
        *(None, [3, 32], [3, 0, 32], [3, 32.5, 32], "32", [True, 32, 32], 32),
        *([3, 16_385, 32], [3, 32, 10**20], [10**6, 32, 32], [3, HUGE, 32]),
    ],
    "crop_pct": ["0.9", 0, -1, [0.9], float("inf"), 1e300, 1e-9, 5e-324, HUGE],
    "interpolation": ["bicubicc", 3, ["bicubic"]],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name} {value}"[:40] for name, value in CASES])
def test_wrong_preprocessing_of_a_folder_is_one_line(name, value, folder):
    edit(folder, lambda config: config["pretrained_cfg"].update({name: value}))
    with pytest.raises(InputError, match=rf"pretrained_cfg of config.json in .*: {name} must be"):
        load_model(f"local-dir:{folder}")


def test_a_crop_that_leaves_no_pixel_of_a_small_image_is_refused():
    check_preprocessing({"input_size": (3, 32, 32), "crop_pct": 10}, "here")
    with pytest.raises(InputError, match=r"here: crop_pct must be a share .* 8 x 32 pixels is resized to 1 to 32768"):
        check_preprocessing({"input_size": (3, 8, 32), "crop_pct": 10}, "here")


@pytest.mark.parametrize(("channels", "values"), [(3, (0.5,)), (1, (0.5,)), (1, (0.5,) * 3), (4, (0.5,) * 4)])
def test_statistics_are_one_number_or_one_of_each_channel(channels, values):
    check_preprocessing({"mean": values, "std": values}, "here", channels=channels)
    check_preprocessing({"input_size": (channels, 32, 32), "mean": values, "std": values}, "here")


def test_model_of_four_channels_keeps_its_statistics_in_a_folder(tmp_path):
    model = timm.create_model("test_resnet", in_chans=4, num_classes=2)
    model.pretrained_cfg.update(mean=(0.5,) * 4, std=(0.2,) * 4)
    save_model(model, tmp_path / "model")
    assert tuple(load_model(f"local-dir:{tmp_path / 'model'}").pretrained_cfg["mean"]) == (0.5,) * 4


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("names", ["abc", [1, 2], {"0": 1}, 3, [["a"]]])
def test_wrong_names_of_classes_are_one_line(names, inner, folder):
    edit(folder, lambda config: (config["pretrained_cfg"] if inner else config).update(label_names=names))
    with pytest.raises(InputError, match=r"label_names of (pretrained_cfg of )?config\.json"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("place", ["config", "model_args", "pretrained_cfg"])
@pytest.mark.parametrize("inner", [False, True])
def test_more_names_than_outputs_are_refused(inner, place, folder):
    def change(config):
        for part in (config, config["model_args"], config["pretrained_cfg"]):
            part.pop("num_classes", None)
        config.get(place, config)["num_classes"] = 10
        (config["pretrained_cfg"] if inner else config)["label_names"] = [f"class {n}" for n in range(14)]

    edit(folder, lambda config: config.setdefault("model_args", {}))
    edit(folder, change)
    with pytest.raises(
        InputError, match=r"label_names of .*config\.json.* are 14, expected at most one for each of the 10"
    ):
        load_model(f"local-dir:{folder}", pretrained=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        ("null", "must hold names with values"),
        ("[]", "must hold names with values"),
        ("{}", "names no architecture"),
        ('{"architecture": null}', "names no architecture"),
        ('{"architecture": ["resnet18"]}', "names no architecture"),
    ],
)
def test_config_that_names_no_architecture_is_one_line(text, message, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=rf"config\.json.* {message}"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("value", [[], "x", 3])
def test_wrong_kind_of_model_arguments_is_one_line(value, folder):
    edit(folder, lambda config: config.update(model_args=value))
    if value:
        with pytest.raises(InputError, match=r"model_args of config\.json .* must be arguments by name"):
            load_model(f"local-dir:{folder}")
