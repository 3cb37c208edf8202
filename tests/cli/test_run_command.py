"""`timm-igkd run` in front of timm-style scripts that know nothing of it: which images are overlaid."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
from run_command_parts import SIZE, WARNINGS, Images, ramp_store
from timm.data import dataset_factory

pytestmark = WARNINGS

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


@pytest.fixture
def probe(tmp_path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def overlaid_share(out: Path, name: str, root: str | None) -> float:
    images = Images(name, root)
    seen = np.load(out / "train.npy")
    original = np.stack([np.asarray(images[i][0]) for i in range(len(images))])
    assert np.load(out / "train_labels.npy").tolist() == [images[i][1] for i in range(len(images))]
    return float((seen != original).any((1, 2, 3)).mean())


def plain(split: str, name: str, root: str | None) -> np.ndarray:
    dataset = timm.data.create_dataset(name, root=root, split=split)
    return np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))])


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


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_the_script_is_not_taken_for_a_training_without_overlay(flag, command, maps, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import argparse\nargparse.ArgumentParser(description='of the script').parse_args()\n")
    outcome = command("run", "--maps", maps, "--", script, flag)
    assert outcome.code == 0, outcome.error
    assert "of the script" in outcome.output
    assert command("run", "--maps", maps, "--", script).code == 2
