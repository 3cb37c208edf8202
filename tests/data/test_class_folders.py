"""Class folders: each split is its own folder, whatever its classes are called; what does not fit is named."""

import numpy as np
import pytest
import timm.data
from PIL import Image

from timm_igkd import load_labeled_images
from timm_igkd.data.unlabeled import load_unlabeled_images
from timm_igkd.errors import InputError
from timm_igkd.runs.data import RunData
from timm_igkd.runs.settings import RunConfig


def write(folder, *names):
    """Write images of unlike pixels, by their path below a folder."""
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / name)
    return str(folder)


def two_splits(folder, *classes, splits=("train", "test")):
    return write(folder, *(f"{split}/{name}/{split}{i}.png" for split in splits for name in classes for i in range(2)))


@pytest.mark.parametrize(
    "name", ["train", "test", "a-val", "dev", "validation", "__b", "a\nb", "a b", "[x]", "Ä", "🦊"]
)
def test_images_stay_in_their_split_whatever_their_class_is_called(name, tmp_path):
    """`datasets` would give the images of a class "train" to the training split, and pass over "__b"."""
    folder = two_splits(tmp_path, name, "car", splits=("train", "val", "test"))
    for split, place in (("train", "train"), ("validation", "val"), ("val", "val"), ("test", "test")):
        images = load_labeled_images(folder, split)
        as_timm = timm.data.create_dataset("folder", root=str(tmp_path / place), search_split=False)
        assert images.class_names == tuple(as_timm.reader.class_to_idx)
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert sorted(np.asarray(images.read(row)[0]).tobytes() for row in range(4)) == sorted(
            np.asarray(Image.open(path)).tobytes() for path in (tmp_path / place).rglob("*.png")
        )


def test_a_split_has_the_classes_of_its_own_folders(tmp_path):
    folder = write(tmp_path, "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png", "test/c/1.png")
    assert load_labeled_images(folder, "train").class_names == ("b", "c")
    assert load_labeled_images(folder, "test").class_names == ("a", "b", "c")
    with pytest.raises(InputError, match="has class 'a', which the training images' 2 classes lack"):
        RunData(RunConfig(dataset=folder, teacher="resnet10t", teacher_epochs=1, validation_fraction=0))


def test_a_class_that_only_the_training_split_has_is_no_fault(tmp_path):
    folder = write(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png")
    data = RunData(RunConfig(dataset=folder, teacher="resnet10t", teacher_epochs=1, validation_fraction=0))
    assert (data.train.class_names, data.test.labels.tolist()) == (("a", "b", "c"), [2])


@pytest.mark.parametrize("labels", ["required", "optional"])
def test_hidden_class_folders_are_refused_by_name(labels, tmp_path):
    folder = write(tmp_path, "train/a/1.png", "train/.b/1.png")
    with pytest.raises(InputError, match=r"train/\.b' holds images, but a name that begins with a dot is hidden"):
        load_labeled_images(folder, "train", labels=labels)


@pytest.mark.parametrize("stray", ["train/stray.png", "train/a/deep/1.png"])
@pytest.mark.parametrize("labels", ["required", "optional"])
def test_an_image_that_lies_elsewhere_than_the_others_is_named(stray, labels, tmp_path):
    folder = write(tmp_path, "train/a/1.png", "train/b/1.png", stray)
    with pytest.raises(InputError, match="lie at different depths") as found:
        load_labeled_images(folder, "train", labels=labels)
    assert repr(stray.removeprefix("train/")) in str(found.value)
    assert len(load_labeled_images(folder, "train", labels="ignored")) == 3


def test_classes_of_one_depth_may_lie_deeper(tmp_path):
    folder = write(tmp_path, "train/animal/cat/1.png", "train/vehicle/car/1.png")
    assert load_labeled_images(folder, "train").class_names == ("car", "cat")


def test_one_class_alone_is_none(tmp_path):
    folder = write(tmp_path, "train/a/1.png", "test/a/1.png")
    with pytest.raises(InputError, match="a folder for each of two classes or more"):
        load_labeled_images(folder, "train")
    assert not load_labeled_images(folder, "train", labels="optional").has_labels


def test_files_of_the_system_beside_images_are_none(tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    for name in ("train/a/._train0.png", "train/__MACOSX/._a.png", "train/.DS_Store", "train/a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"none")
    assert load_labeled_images(folder, "train").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("part", "rows"),
    [("[:3]", [0, 1, 2]), ("[2:]", [2, 3]), ("[25%:75%]", [1, 2]), ("[-1:]", [3]), ("[:]", [0, 1, 2, 3])],
)
@pytest.mark.parametrize("labels", ["required", "ignored"])
def test_a_part_of_a_split_is_what_datasets_makes_of_it(part, rows, labels, tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    images, whole = (load_labeled_images(folder, split, labels=labels) for split in (f"train{part}", "train"))
    assert [images.read(row)[0].tobytes() for row in range(len(images))] == [
        whole.read(row)[0].tobytes() for row in rows
    ]


@pytest.mark.parametrize("part", ["[", "[9:]", "[x]", "[:200%]"])
def test_a_part_that_is_none_is_refused_in_one_line(part, tmp_path):
    with pytest.raises(InputError, match="split 'train"):
        load_labeled_images(two_splits(tmp_path, "a", "b"), f"train{part}")


def test_parts_that_are_added_are_read_too(tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    assert len(load_labeled_images(folder, "train[:1]+train[3:]")) == 2
    assert len(load_labeled_images(folder, "train+test")) == 8


def test_a_folder_is_found_by_its_whole_name(tmp_path):
    folder = two_splits(tmp_path, "a", "b", splits=("set[1]", "test"))
    assert len(load_labeled_images(folder, "set[1]")) == len(load_unlabeled_images(folder, "set[1]")) == 4


@pytest.mark.parametrize("name", ["test", "train", "a-val"])
def test_where_datasets_looks_for_the_splits_a_file_of_two_is_refused(name, tmp_path):
    """Splits that are no folder's whole name; a class called as a split is read into both."""
    folder = two_splits(tmp_path, name, "car", splits=("train_images", "test_images", "val_images"))
    if name == "train":  # of the training images it would be read twice
        (tmp_path / "test_images" / name).rename(tmp_path / "test_images" / "bus")
        (tmp_path / "val_images" / name).rename(tmp_path / "val_images" / "bus")
    with pytest.raises(
        InputError, match=r"by one part of its path and to .*; rename the folder, or put the images into"
    ):
        load_labeled_images(folder, "train")


def test_splits_that_datasets_finds_are_read(tmp_path):
    folder = two_splits(tmp_path, "a", "b", splits=("train_images", "test_images"))
    assert load_labeled_images(folder, "test").labels.tolist() == [0, 0, 1, 1]


def test_labels_in_a_metadata_file_are_still_read(tmp_path):
    folder = write(tmp_path, "train/1.png", "train/2.png")
    lines = ('{"file_name": "1.png", "label": 7}', '{"file_name": "2.png", "label": 3}')
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert load_labeled_images(folder, "train", label_column="label").labels.tolist() == [7, 3]


def test_images_without_labels_are_those_of_the_split_alone(tmp_path):
    folder = two_splits(tmp_path, "train", "test")
    assert len(load_labeled_images(folder, "train", labels="ignored")) == 4
    assert len(load_unlabeled_images(folder, "test")) == 4


def test_a_missing_split_names_those_that_are_there_and_the_flags(tmp_path):
    with pytest.raises(InputError, match=r"\['train', 'validation'\]; name one by --split, .* and --test-split"):
        load_labeled_images(two_splits(tmp_path, "a", "b", splits=("train", "val")), "test")
