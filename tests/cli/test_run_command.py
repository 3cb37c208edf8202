"""`timm-igkd run` in front of timm-style scripts that know nothing of it."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
from command_lines import subprocess_environment
from timm.data import auto_augment, dataset_factory
from tiny_parts import ramp, write_store

from timm_igkd.cli import main as cli
from timm_igkd.data.items import read_item
from timm_igkd.errors import InputError, message_of
from timm_igkd.overlay import timm_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # timm leaves the images it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]

SCRIPTS = Path(__file__).parent / "timm_scripts"
TRAIN = SCRIPTS / "train.py"
N, SIZE = 40, 16
MODEL = ["--model", "test_resnet", "--num-classes", "2", "--img-size", "32"]

# What a script gets from timm: every image of both splits, by name of the dataset and its root.
PROBE = """
import sys
import numpy as np
from timm.data import create_dataset
from timm.data import auto_augment, dataset_factory

name, root, out = sys.argv[1:]
for split, is_training in (("train", True), ("validation", False)):
    dataset = create_dataset(name, root=root or None, split=split, is_training=is_training)
    np.save(f"{out}/{split}.npy", np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))]))
    np.save(f"{out}/{split}_labels.npy", np.array([dataset[i][1] for i in range(len(dataset))]))
evaluated = dataset_factory.create_dataset(name, root=root or None, split="train", is_training=False)
np.save(f"{out}/eval.npy", np.asarray(evaluated[0][0]))
training = create_dataset(name, root=root or None, split="train", is_training=True)
assert not hasattr(training, "set_epoch"), "timm's train.py would not tell the sampler the epoch"
"""


def image_folder(tiny_images: Callable[..., Path], n: int = N, **options: Any) -> Path:
    tiny_images(kind="folder", n=8, size=SIZE, split="validation", **options)
    return tiny_images(kind="folder", n=n, size=SIZE, split="train", **options)


class Images:
    """Items of timm's training dataset as the store is built from them."""

    def __init__(self, name: str, root: str | None, count: int | None = None):
        self.dataset = timm.data.create_dataset(name, root=root, split="train")
        self.count = count or len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return read_item(self.dataset, index)


def ramp_store(folder: Path, name: str, root: object, count: int | None = None) -> Path:
    images = Images(name, None if root is None else str(root), count)
    maps = [ramp(index, *images[index][0].size) for index in range(images.count)]
    return write_store(folder, images, maps).path


@pytest.fixture
def folder(tiny_images) -> Path:
    return image_folder(tiny_images)


@pytest.fixture
def maps(folder, tmp_path) -> Path:
    return ramp_store(tmp_path / "maps", "", folder)


@pytest.fixture
def probe(tmp_path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def summary(output: Path) -> list[dict[str, str]]:
    with open(output / "summary.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]


def overlaid_share(out: Path, name: str, root: str | None) -> float:
    images = Images(name, root)
    seen = np.load(out / "train.npy")
    original = np.stack([np.asarray(images[i][0]) for i in range(len(images))])
    assert np.load(out / "train_labels.npy").tolist() == [images[i][1] for i in range(len(images))]
    return float((seen != original).any((1, 2, 3)).mean())


def plain(split: str, name: str, root: str | None) -> np.ndarray:
    dataset = timm.data.create_dataset(name, root=root, split=split)
    return np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))])


# ---- which images are overlaid


@pytest.mark.parametrize(("prob", "low", "high"), [(0.5, 0.25, 0.75), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_about_p_of_the_training_images_and_no_evaluation_image(
    command, folder, maps, probe, tmp_path, prob, low, high
):
    assert command("run", "--maps", maps, "--overlay-prob", prob, "--", probe, "", folder, tmp_path).code == 0
    assert low <= overlaid_share(tmp_path, "", str(folder)) <= high
    assert np.array_equal(np.load(tmp_path / "validation.npy"), plain("validation", "", str(folder)))
    assert np.array_equal(np.load(tmp_path / "eval.npy"), plain("train", "", str(folder))[0])


def test_hfds_is_overlaid(command, tiny_images, probe, tmp_path):
    tiny_images(n=8, size=SIZE, split="validation")
    name = f"hfds/{tiny_images(n=12, size=SIZE)}"
    maps = ramp_store(tmp_path / "maps", name, None)
    assert command("run", "--maps", maps, "--overlay-prob", 1, "--", probe, name, "", tmp_path).code == 0
    assert overlaid_share(tmp_path, name, None) == 1
    assert np.array_equal(np.load(tmp_path / "validation.npy"), plain("validation", name, None))


def test_an_hfds_image_without_a_map_is_named(command, tiny_images, folder, maps, probe, tmp_path):
    name = f"hfds/{tiny_images(n=12, size=SIZE, seed=5, name='others')}"
    outcome = command("run", "--maps", maps, "--", probe, name, "", tmp_path)
    assert outcome.code == 2
    assert f"image 0 of {name!r} has no map" in outcome.error


def test_torchvision_dataset_is_overlaid(command, folder, probe, tmp_path):
    maps = ramp_store(tmp_path / "maps", "torch/image_folder", folder)
    outcome = command("run", "--maps", maps, "--overlay-prob", 1, "--", probe, "torch/image_folder", folder, tmp_path)
    assert outcome.code == 0
    assert overlaid_share(tmp_path, "torch/image_folder", str(folder)) == 1


def test_cifar10_of_torchvision_is_overlaid(command, probe, tmp_path):
    import pickle

    root = tmp_path / "data" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": draws.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    from torchvision.datasets import CIFAR10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        maps = ramp_store(tmp_path / "maps", "torch/cifar10", root.parent)
        options = ["--maps", maps, "--overlay-prob", 1]
        assert command("run", *options, "--", probe, "torch/cifar10", root.parent, tmp_path).code == 0
        assert overlaid_share(tmp_path, "torch/cifar10", str(root.parent)) == 1
        assert np.array_equal(
            np.load(tmp_path / "validation.npy"), plain("validation", "torch/cifar10", str(root.parent))
        )


def test_controls_and_weight_reach_the_overlay(command, folder, maps, probe, tmp_path):
    images = plain("train", "", str(folder)).astype(int)
    for options, expected in (
        (["--overlay-source", "blank"], images / 2),
        (["--overlay-source", "blank", "--overlay-weight", "0.25"], images * 0.75),
    ):
        command("run", "--maps", maps, "--overlay-prob", 1, *options, "--", probe, "", folder, tmp_path)
        assert np.abs(np.load(tmp_path / "train.npy") - expected).max() <= 1


def test_a_transform_the_script_gives_is_applied_after_the_overlay(command, folder, maps, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy as np\nfrom timm.data import create_dataset\n"
        "dataset = create_dataset('', root=sys.argv[1], split='train', transform=lambda image: np.asarray(image)[:4])\n"
        "assert dataset[0][0].shape[0] == 4 and dataset.transform is not None and dataset.reader.class_to_idx\n"
    )
    assert command("run", "--maps", maps, "--", script, folder).code == 0


def test_timm_is_left_as_it_was(command, folder, maps, probe, tmp_path):
    before, argv, path = dataset_factory.create_dataset, sys.argv, list(sys.path)
    command("run", "--maps", maps, "--", probe, "", folder, tmp_path)
    assert timm.data.create_dataset is dataset_factory.create_dataset is before
    assert (sys.argv, sys.path) == (argv, path)


# ---- learning


def train(command, folder: Path, out: Path, *options: object, run: tuple[object, ...] | None = None) -> list[dict]:
    script = [TRAIN, folder, *MODEL, "--epochs", 2, "--output", out, *options]
    outcome = command("run", *run, "--", *script) if run is not None else run_alone(script)
    assert outcome is None or outcome.code == 0
    return summary(out)


def run_alone(script: list[object]) -> None:
    from timm_igkd.with_plugin import run_script

    run_script([str(part) for part in script])


def test_probability_0_trains_as_the_script_alone(command, folder, maps, tmp_path):
    alone = train(command, folder, tmp_path / "alone")
    assert train(command, folder, tmp_path / "zero", run=("--maps", maps, "--overlay-prob", 0)) == alone
    assert train(command, folder, tmp_path / "half", run=("--maps", maps, "--overlay-prob", 0.5)) != alone


FIVE_LINES = {  # inserted before the line that begins with the key
    "parser = argparse": "from timm_igkd import *\n",
    "    dataset_eval = ": "    dataset_train = IGOverlayDataset(dataset_train, MapStore({maps!r}), {overlay})\n",
    "    if args.distributed:\n        task.": "{task}",
}


def with_added_lines(path: Path, maps: Path, overlay: str = "IGOverlay(0.5)", task: str = "") -> int:
    """Write train.py with a plugin's lines added; return how many were added."""
    original = TRAIN.read_text()
    source = original
    for place, lines in FIVE_LINES.items():
        assert source.count(place) == 1
        source = source.replace(place, lines.format(maps=str(maps), overlay=overlay, task=task) + place)
    path.write_text(source)
    return len(source.splitlines()) - len(original.splitlines())


def test_run_learns_what_the_library_learns(command, folder, maps, tmp_path):
    with_added_lines(tmp_path / "library.py", maps)
    options = ["--aa", "rand-m9-inc1", "--reprob", "0.3", "--mixup", "0.2"]
    run_alone([tmp_path / "library.py", folder, *MODEL, "--epochs", 2, "--output", tmp_path / "library", *options])
    found = train(command, folder, tmp_path / "run", *options, run=("--maps", maps, "--overlay-prob", 0.5))
    assert found == summary(tmp_path / "library")


@pytest.mark.parametrize("view", ["same", "clean"])
def test_five_lines_make_a_timm_script_distil(folder, maps, teacher_folder, tmp_path, view):
    task = (
        f'    teacher = load_model("local-dir:{teacher_folder}")\n'
        f"    task = IGDistillationTask(model, teacher, teacher_view={view!r}, view_layout='flat')\n"
        "    assert not any(parameter.requires_grad for parameter in teacher.parameters())\n"
    )
    added = with_added_lines(tmp_path / "five.py", maps, f"IGOverlay(), teacher_view={view!r}", task)
    assert added == 5
    run_alone([tmp_path / "five.py", folder, *MODEL, "--output", tmp_path / "out", "--workers", 1])
    assert np.isfinite(float(summary(tmp_path / "out")[0]["train_loss"]))


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "2", "--mixup", "0.2", "--cutmix", "1.0", "--reprob", "0.5"],
        ["--no-prefetcher", "--mixup", "0.2", "--aa", "augmix-m5-w4-d2"],
        ["--aa", "rand-m9-tigkd", "--workers", "1"],
        ["--aug-splits", "2", "--aa", "rand-m9-inc1"],
    ],
    ids=["workers and mixup", "no prefetcher", "tigkd", "splits"],
)
def test_run_takes_timms_options(command, folder, maps, tmp_path, options):
    if "--aug-splits" in options:  # the splits' targets are repeated by timm's collate
        options = [*options, "--smoothing", "0"]
    assert np.isfinite(
        float(train(command, folder, tmp_path / "out", *options, run=("--maps", maps))[-1]["train_loss"])
    )


def test_augmentation_splits_overlay_by_the_option_and_warn_that_the_name_does_nothing(
    command, folder, maps, tmp_path, monkeypatch
):
    """The splits are augmented after one crop of one image, where it is too late for an overlay of its own."""
    monkeypatch.setattr(timm_ops, "_warned", False)
    options = ["--aug-splits", "2", "--smoothing", "0", "--aa", "rand-m9-n8-p1-tigkd"]
    with pytest.warns(UserWarning, match="IGOverlay changes nothing outside"):
        none = train(command, folder, tmp_path / "none", *options, run=("--maps", maps, "--overlay-prob", 0))
    all_of_them = train(command, folder, tmp_path / "all", *options, run=("--maps", maps, "--overlay-prob", 1))
    assert none != all_of_them


@pytest.mark.parametrize("workers", [0, 1])
def test_magnitude_10_posterizes_to_black_instead_of_failing(command, folder, maps, tmp_path, workers):
    options = ["--aa", "rand-m10-n8-p1-inc1", "--workers", workers]
    assert train(command, folder, tmp_path / "out", *options, run=("--maps", maps))
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


def test_timms_own_distillation_runs(command, folder, maps, teacher_folder, tmp_path):
    options = ["--kd-model-name", f"local-dir:{teacher_folder}", "--kd-loss-weight", "0.5"]
    rows = train(command, folder, tmp_path / "out", *options, run=("--maps", maps, "--overlay-prob", 1))
    assert np.isfinite(float(rows[-1]["train_loss"]))


def test_script_as_a_module(command, folder, maps, tmp_path, monkeypatch):
    (tmp_path / "a_module.py").write_text(
        "import sys\nfrom timm.data import create_dataset\n"
        "if __name__ == '__main__':\n    create_dataset('', root=sys.argv[1], split='train', is_training=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert command("run", "--maps", maps, "--", "-m", "a_module", folder).code == 0


@pytest.mark.slow
def test_torchrun_trains_in_two_processes(folder, maps, tmp_path):
    executable = Path(sys.executable).with_name("timm-igkd")
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", "2", str(executable)]
    script = ["--", str(TRAIN), str(folder), *MODEL, "--workers", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "run", "--maps", str(maps), "--overlay-prob", "0.5", *script],
        capture_output=True,
        text=True,
        timeout=300,
        env=subprocess_environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert len(summary(tmp_path / "out")) == 1


# ---- errors


@pytest.mark.parametrize("workers", [0, 2])
def test_maps_of_other_data_end_the_script_with_our_line(command, folder, tiny_images, tmp_path, workers):
    other = ramp_store(tmp_path / "other", "", image_folder(tiny_images, seed=7, name="other_images"))
    outcome = command("run", "--maps", other, "--", TRAIN, folder, *MODEL, "--workers", workers)
    assert outcome.code == 2
    assert "image 0 (0000.png) of" in outcome.error
    assert "has no map: its pixels are in none of the 40 rows" in outcome.error


def test_an_error_in_a_worker_is_one_clean_line(command, folder, maps, tmp_path):
    damaged = sorted((folder / "train" / "class_0").iterdir())[3]
    damaged.write_bytes(b"cut")
    outcome = command("run", "--maps", maps, "--", TRAIN, folder, *MODEL, "--workers", 1)
    assert outcome.code == 2
    assert outcome.error.startswith(f"timm-igkd: error: image 3 ({damaged.name}) of")
    assert "Traceback" not in outcome.error


def test_a_prefix_of_the_maps_is_refused_before_training(command, folder, tmp_path):
    prefix = ramp_store(tmp_path / "prefix", "", folder, count=30)
    outcome = command("run", "--maps", prefix, "--", TRAIN, folder, *MODEL)
    assert outcome.code == 2
    assert "the store covers the first 30 of 40 images" in outcome.error


def test_greyscale_training_is_refused(command, folder, maps, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom timm.data import create_dataset\n"
        "create_dataset('', root=sys.argv[1], split='train', is_training=True, input_img_mode='L')\n"
    )
    outcome = command("run", "--maps", maps, "--", script, folder)
    assert (outcome.code, "need RGB images, the script asks for 'L'" in outcome.error) == (2, True)


@pytest.mark.parametrize(
    "body", ["", "raise SystemExit(0)", "create_dataset('', root=sys.argv[1], split='validation')"]
)
def test_a_script_without_a_training_dataset_is_named(command, folder, maps, tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nfrom timm.data import create_dataset\n{body}\n")
    outcome = command("run", "--maps", maps, "--", script, folder)
    assert outcome.code == 2
    assert f"{str(script)!r} ended without asking timm.data.create_dataset for a training dataset" in outcome.error


def test_run_says_first_what_it_overlays(maps, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('script', file=sys.stderr)")
    assert cli.main(["run", "--maps", str(maps), "--overlay-prob", "0.25", "--", str(script)]) == 2
    first, second, _ = capsys.readouterr().err.splitlines()
    assert f"overlays aligned maps of {maps} (n = 40) on a share of 0.25 of the training images" in first
    assert "tigkd in the script's --aa replaces --overlay-prob" in first
    assert second == "script"


def test_the_scripts_own_errors_and_exit_codes_are_its_own(folder, maps, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="7"):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    script.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    script.write_text(f"open({str(tmp_path / 'none' / 'x')!r})")
    with pytest.raises(SystemExit, match="1"):
        cli.main(["run", "--maps", str(maps), "--", str(script)])
    assert "FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--overlay-prob", "1.5"], r"overlay_prob must be in [0, 1], got 1.5"),
        (["--overlay-weight", "-1"], r"overlay_weight must be in [0, 1], got -1"),
        (["--overlay-probb", "1"], "unknown argument '--overlay-probb' (did you mean '--overlay-prob'?)"),
        (["--maps", "nowhere"], "nowhere"),
        (["--", "missing.py"], "script 'missing.py' does not exist"),
        ([], "expected a script to run and its arguments, got none"),
    ],
)
def test_bad_arguments_are_one_line(command, maps, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    outcome = command("run", "--maps", maps, *argv)
    assert outcome.code == 2
    assert message in outcome.error


def test_a_workers_error_is_its_last_line():
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "timm_igkd.errors.InputError: the first\n\nThe above exception was the direct cause of:\n\n"
        "Traceback (most recent call last):\n  File y\ntimm_igkd.errors.InputError: image 3: no map\n"
    )
    assert message_of(InputError(text)) == "image 3: no map"
    assert message_of(InputError("image 3: no map")) == "image 3: no map"
