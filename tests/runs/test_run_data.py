"""Which images a run fits and chooses by."""

import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from command_lines import tiny_run, two_splits
from tiny_parts import noise_image

from timm_igkd import load_model
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import check_numbers
from timm_igkd.errors import InputError
from timm_igkd.runs.data import RunData, cut_validation, load_other_split, load_split
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def config(tiny_images) -> RunConfig:
    """A run on 40 images of class 0 to 3."""
    images = tiny_images(n=40, classes=4)
    return RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.3)


def test_validation_cut_keeps_the_share_of_every_class(config):
    train = load_split(config, "train")
    fitting, validation = cut_validation(config, train)
    assert validation is not None
    assert np.bincount(validation.labels).tolist() == [3] * 4
    assert np.bincount(fitting.labels).tolist() == [7] * 4


def test_cut_parts_the_images_and_follows_the_seed(config):
    train = load_split(config, "train")

    def cut(seed):
        parts = cut_validation(replace(config, seed=seed), train)
        return [{part.read(index)[0].tobytes() for index in range(len(part))} for part in parts]

    first, again, other = cut(0), cut(0), cut(1)
    assert not first[0] & first[1]
    assert len(first[0] | first[1]) == 40
    assert first == again != other


@pytest.mark.parametrize("setting", ["test_split", "validation_split"])
@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train", "train"),
        ("train", "train[:4]"),
        ("train[:8]", "train"),
        ("train[:8]", "train[:8]"),
        ("train+test", "test"),
        ("train", "test + train"),
        ("train", "all"),
    ],
)
def test_what_is_trained_on_is_neither_watched_nor_tested_on(setting, train, other, tiny_images):
    images = two_splits(tiny_images)
    config = RunConfig(
        protocol="demo", dataset=str(images), train_split=train, validation_split=None, validation_fraction=0.25
    )
    with pytest.raises(InputError, match=re.escape(f"split {other!r} of {str(images)!r} holds images of {train!r}, ")):
        RunData(replace(config, **{setting: other}))


def test_stretches_of_one_split_may_be_apart(tiny_images):
    config = RunConfig(protocol="demo", dataset=str(two_splits(tiny_images)), validation_split="test")
    config = replace(config, train_split="train[:10]", test_split="train[10:]")
    data = RunData(config)
    assert (len(data.train), len(data.test)) == (10, 6)
    with pytest.raises(InputError, match=re.escape("split 'train[9:]' of ")):
        RunData(replace(config, test_split="train[9:]"))


@pytest.mark.parametrize(
    ("validation", "test"), [("test", "test"), ("test[:4]", "test"), ("test+test", "test"), ("test[:5]", "test[4:]")]
)
def test_what_is_tested_on_is_not_watched(validation, test, tiny_images):
    """It is read once, at the end, as the card says."""
    config = RunConfig(protocol="demo", dataset=str(two_splits(tiny_images)))
    with pytest.raises(
        InputError, match=re.escape(f"validation_split {validation!r} holds images of test_split {test!r}")
    ):
        RunData(replace(config, validation_split=validation, test_split=test))
    apart = RunData(replace(config, validation_split="test[:4]", test_split="test[4:]"))
    assert (len(apart.validation), len(apart.test)) == (4, 4)


def test_no_fraction_means_no_validation(config):
    train = load_split(config, "train")
    assert cut_validation(replace(config, validation_fraction=0.0), train) == (train, None)


@pytest.mark.parametrize(
    ("counts", "fraction", "remedy"),
    [
        ([4, 4, 4], 0.1, "0.25, or to 0 for none"),
        ([1, 3, 2], 0.1, "0.34, or to 0 for none"),
        ([2, 2], 0.2, "0.5, or to 0 for none"),
        ([6, 1], 0.05, "0.17, or to 0 for none"),
        ([3, 3], 0.9, "0.34, or to 0 for none"),
        ([150, 2], 0.001, "0.01, or to 0 for none"),
        ([1, 1, 1], 0.1, "0 for none"),
        ([1, 1, 1], 1.0, "0 for none"),
    ],
)
def test_fraction_that_parts_nothing_is_refused_with_one_that_does(config, counts, fraction, remedy):
    images = load_split(config, "train").rows
    rows = images.select([0] * sum(counts)).remove_columns("label")
    rows = rows.add_column("label", np.repeat(np.arange(len(counts)), counts).tolist())
    train = LabeledImages(rows, "few", "train")
    with pytest.raises(InputError, match=r"to watch the epochs by; set it to") as raised:
        cut_validation(replace(config, validation_fraction=fraction), train)
    assert str(raised.value).startswith(f"validation_fraction {fraction:g} leaves ")
    assert str(raised.value).endswith(f"; set it to {remedy}")
    parts = cut_validation(replace(config, validation_fraction=float(remedy.partition(",")[0].split()[0])), train)
    assert sum(len(part) for part in parts if part is not None) == sum(counts)
    assert (parts[1] is None) == (max(counts) == 1)


def test_remedies_of_a_small_data_set_lead_to_a_run(recipe, tiny_images, monkeypatch):
    """Four images of each class, with the protocol's fraction and batch."""
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    command = [*tiny_run(two_splits(tiny_images, n=8)), "--overlay-prob", 0, "--batch-size", 64]
    outcome = recipe(*command, "--validation-fraction", 0.1)
    assert outcome.error.endswith(
        "leaves 8 of 8 images to train on and 0 to watch the epochs by; set it to 0.25, or to 0 for none"
    )
    for fraction, count in ((0.25, 6), (0, 8)):
        options = [*command, "--validation-fraction", fraction, "--name", f"run{count}"]
        assert f"there are {count} to train on; lower batch_size" in recipe(*options).error
        outcome = recipe(*options, "--batch-size", 2)
        assert outcome.code == 0, outcome.error


def test_limit_draws_by_the_seed(config):
    def labels_and_pixels(seed):
        split = load_split(replace(config, seed=seed), "train", 8)
        return [split.read(index)[0].tobytes() for index in range(len(split))]

    assert labels_and_pixels(0) == labels_and_pixels(0) != labels_and_pixels(1)


def test_first_label_beyond_those_of_the_training_split_is_refused(config):
    rows = datasets.load_dataset(config.dataset, split="train").select(range(4)).remove_columns("label")
    for split, last in (("train", 3), ("validation", 3), ("test", 4)):
        rows.add_column("label", [0, 1, 2, last]).to_parquet(
            str(Path(config.dataset) / f"{split}-00000-of-00001.parquet")
        )
    plain = replace(config, label_column="label")
    train = load_split(plain, "train")
    assert len(load_other_split(plain, "validation", train)) == 4
    with pytest.raises(InputError, match="has label 4, the training split's classes are 0 to 3"):
        load_other_split(plain, "test", train)


@pytest.mark.parametrize("kind", ["copy", "link"])
def test_a_test_split_that_is_the_training_split_by_another_name_is_refused(kind, tiny_images):
    images = tiny_images("folder", n=8)
    if kind == "copy":
        shutil.copytree(images / "train", images / "test")
    else:
        (images / "test").symlink_to("train")
    data = RunData(RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.25))
    told = "8 of the 8 images of test_split 'test' are also in train_split 'train': accuracy on what is trained on or"
    with pytest.raises(InputError, match=told):
        data.check_images(mapped_first=True)


@pytest.mark.parametrize(("train", "watched"), [("train", "test"), ("test", "train")])
def test_what_is_watched_is_no_copy_either(train, watched, tiny_images):
    """Neither of what is trained on nor of what is tested on."""
    images = two_splits(tiny_images, kind="folder")
    shutil.copytree(images / "test", images / "val")
    splits = {"train_split": train, "test_split": watched, "validation_split": "val"}
    data = RunData(RunConfig(protocol="demo", dataset=str(images), **splits))
    told = {"test": "images of test_split 'test' are also in validation_split 'val'"}
    told |= {"train": "images of validation_split 'val' are also in train_split 'test'"}
    with pytest.raises(InputError, match=f"8 of the 8 {told[watched]}"):
        data.check_images(mapped_first=False)


@pytest.mark.parametrize(("n", "twins", "is_told"), [(200, 2, False), (200, 3, True), (200, 20, True), (20, 2, True)])
def test_a_few_twins_are_of_the_data_sets_makers_and_told(n, twins, is_told, tiny_images, capsys):
    images = tiny_images("folder", n=8)
    tiny_images("folder", n=n, split="test")
    files = [sorted((images / split).rglob("*.png")) for split in ("train", "test")]
    for i in range(twins):
        shutil.copy(files[0][i % 4], files[1][i])
    config = RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.25)
    RunData(config).check_images(mapped_first=True)
    told = (
        f"note: {twins} of the {n} images of test_split 'test' are also in train_split 'train'; accuracy on them says"
    )
    assert (told in capsys.readouterr().err) is is_told
    shutil.copy(files[0][0], files[1][twins])
    if twins + 1 > n / 10:
        with pytest.raises(InputError, match=f"{twins + 1} of the {n} images"):
            RunData(config).check_images(mapped_first=True)


def saved_images(folder: Path, sizes: list[tuple[int, int]], split: str, seed: int = 0) -> None:
    """Save an image of each size (width, height) in turn into two folders of classes."""
    for index, size in enumerate(sizes):
        path = folder / split / f"class_{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed + index, *size).save(path)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(20, 12)] * 8, (12, 20)), ([(20, 12)] + [(40, 30)] * 7, None), ([(40, 30)] * 7 + [(20, 12)], None)],
)
def test_the_images_size_is_that_of_all_of_them(sizes, expected, tmp_path):
    """Not the first one's, which a model of random weights would read all others at."""
    saved_images(tmp_path / "images", sizes, "train")
    saved_images(tmp_path / "images", [(20, 12)] * 4, "test", seed=100)
    config = RunConfig(
        protocol="demo", dataset=str(tmp_path / "images"), validation_split=None, validation_fraction=0.0
    )
    data = RunData(config)
    assert data.image_size == expected


def test_models_of_random_weights_keep_their_size_where_images_have_several(recipe, tmp_path):
    for split, seed in (("train", 0), ("test", 100)):
        saved_images(tmp_path / "images", [(10, 12)] + [(40, 30)] * 11, split, seed)
    outcome = recipe(*tiny_run(tmp_path / "images", "--overlay-prob", 0, "--student", "test_resnet"))
    assert outcome.code == 0, outcome.error
    for name in ("teacher", "student"):
        config = load_model(f"local-dir:{tmp_path / 'runs' / 'run' / name}").pretrained_cfg
        assert config["input_size"][1:] != (12, 10), name
        assert min(config["input_size"][1:]) >= 32, name


def test_images_of_one_class_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["only"])})
    rows = {"image": [noise_image(seed) for seed in range(4)], "label": [0] * 4}
    for split in ("train", "test"):
        (tmp_path / "one" / split).mkdir(parents=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "one" / split / "0.parquet")
    with pytest.raises(InputError, match=r"split 'train' of '.*one' has one class, expected two or more"):
        RunData(RunConfig(protocol="demo", dataset=str(tmp_path / "one"), validation_split=None))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], None, None),
        ([0, 3], None, "it has label 3, the training split's classes are 0 to 2; give splits of the same classes"),
        ([0, 1], ["b", "a", "c"], "it names its classes, the training split does not, so that they may be numbered"),
    ],
)
def test_a_split_is_counted_as_a_training_split_without_names(labels, names, message):
    with nullcontext() if message is None else pytest.raises(InputError, match=message):
        check_numbers(np.array(labels), names, 3, "it")
