"""--map-method: the run's maps by another method, checked before anything is written; their score on the page."""

import pytest
from command_lines import Runner, tiny_run, two_splits
from tiny_parts import tiny_teacher

from timm_igkd import MapStore, RunConfig, save_model
from timm_igkd.errors import InputError
from timm_igkd.files import read_mapping
from timm_igkd.runs.parsing import parse_config, save_config


@pytest.fixture
def vit(tmp_path) -> list[object]:
    save_model(tiny_teacher("test_vit", classes=2, size=32), tmp_path / "vit")
    return ["--teacher", f"local-dir:{tmp_path / 'vit'}"]


def of(images, vit) -> list[object]:
    """Return a run's flags with a given teacher, without the steps that only integrated gradients have."""
    flags = tiny_run(images, *vit, "--teacher-epochs", 0, "--student", "test_resnet", "--overlay-prob", 0.5)
    at = flags.index("--n-steps")
    return [*flags[:at], *flags[at + 2 :], "--student-init", "random"]


def test_run_overlays_grad_cam_and_its_page_shows_the_score(
    recipe: Runner, command: Runner, vit, tiny_images, tmp_path
) -> None:
    images, run = two_splits(tiny_images), tmp_path / "runs" / "run"
    flags = [*of(images, vit), "--map-method", "grad_cam"]
    outcome = recipe(*flags)
    assert outcome.code == 0, outcome.error
    assert MapStore(run / "maps").provenance.options.method == "grad_cam"
    assert "16 Grad-CAM maps" in (run / "report" / "index.html").read_text()
    data = ["--dataset", images, "--split", "train", "--teacher", f"local-dir:{run / 'teacher'}"]
    scored = command("score", "--maps", run / "maps", *data, "--steps", 2, "--out", run / "maps" / "score.json")
    assert "again puts the score on the run's page" in scored.output
    outcome = recipe(*flags)
    assert (outcome.code, "student: complete, skipped" in outcome.output) == (0, True)
    assert '<section id="faithfulness">' in (run / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("init", "name"), [("random", "test_resnet, trained from scratch"), ("pretrained", "fine-tuned")]
)
def test_maps_of_a_trained_teacher_are_not_called_those_of_timms(
    init, name, recipe: Runner, command: Runner, teacher_folder, tiny_images, tmp_path
) -> None:
    images, run = two_splits(tiny_images), tmp_path / "runs" / "run"
    start = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-init", init] if init == "pretrained" else []
    outcome = recipe(*tiny_run(images, *start, "--overlay-prob", 0.5))
    assert outcome.code == 0, outcome.error
    store = MapStore(run / "maps")
    assert name in store.provenance.teacher.name
    assert f"{name}`" in (run / "maps" / "README.md").read_text().partition("\n\n")[0]
    checked = ["--dataset", images, "--split", "train", "--recompute", 2]
    assert command("verify", "--maps", run / "maps", *checked).code == 0  # the teacher lies beside them
    (run / "teacher").rename(tmp_path / "elsewhere")
    outcome = command("verify", "--maps", run / "maps", *checked)
    assert outcome.code == 2
    assert "is not found from here" in outcome.error
    assert "name the one that made it with --teacher" in outcome.error


def test_teacher_without_a_map_leaves_no_folder(recipe: Runner, tiny_images, tmp_path) -> None:
    demo = ["--protocol", "demo", "--validation-split", "none", "--batch-size", 4]
    outcome = recipe("--map-method", "grad_cam", "--dataset", two_splits(tiny_images, size=8), *demo)
    assert outcome.code == 2
    assert "is a map of a single pixel" in outcome.error
    assert not list((tmp_path / "runs").glob("*"))


def test_steps_and_reduction_follow_the_method():
    found = RunConfig(map_method="grad_cam")
    assert (found.n_steps, found.map_reduction) == (1, "positive")
    assert found.ig_options().method == "grad_cam"
    assert (RunConfig().n_steps, RunConfig().map_reduction) == ("auto", "abs_sum")


def test_a_reduction_that_grad_cam_lacks_is_refused_as_its_options_refuse_it():
    with pytest.raises(InputError, match="reduction of grad_cam must be 'positive'"):
        RunConfig(map_method="grad_cam", map_reduction="abs_sum")


@pytest.mark.parametrize("settings", [{}, {"map_method": "grad_cam"}, {"map_method": "none", "overlay_prob": 0.0}])
def test_the_saved_settings_of_a_run_hold_the_reduction_and_mean_the_same_run(settings, tmp_path):
    config, path = RunConfig(**settings), tmp_path / "config.yaml"
    save_config(config, path)
    assert read_mapping(path)["map_reduction"] == (
        "positive" if settings.get("map_method") == "grad_cam" else "abs_sum"
    )
    assert parse_config(RunConfig, ["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 5}, "n_steps is of the path of method 'ig'"),
        ({"map_baseline": "black"}, "baseline is of the path of method 'ig'"),
        ({"engine": "captum"}, "engine captum is the reference of map_method ig alone"),
    ],
)
def test_settings_of_a_path_are_refused_for_a_method_without_one(settings, message):
    with pytest.raises(InputError, match=message):
        RunConfig(map_method="saliency", **settings)
