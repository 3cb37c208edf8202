"""Class folders: each split is its own folder, whatever its classes are called; what does not fit is named."""

import os

import numpy as np
import pytest
import timm.data
from PIL import Image

from timm_igkd import load_labeled_images
from timm_igkd.data.labels import class_order
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


@pytest.mark.parametrize(
    "splits", [("Training", "Testing"), ("TRAIN", "TEST"), ("train", "Test"), ("Train", "evaluation")]
)
def test_splits_are_found_in_upper_and_lower_case(splits, tmp_path):
    """`datasets` knows them in lower case alone, and would read all images as training split."""
    folder = two_splits(tmp_path, "a", "b", splits=splits)
    for split, place in zip(("train", "test"), splits, strict=True):
        images = load_labeled_images(folder, split)
        assert [os.path.relpath(row["path"], folder).split(os.sep)[0] for row in images.rows["image"]] == [place] * 4


def test_folders_that_nobody_called_splits_are_not_read_as_one(tmp_path):
    folder = two_splits(tmp_path, "a", "b", splits=("fold1", "fold2"))
    with pytest.raises(InputError, match="below 'fold1' and 'fold2', and would all be of split 'train'; name one"):
        load_labeled_images(folder, "train")
    assert len(load_labeled_images(folder, "fold1")) == 4


@pytest.mark.parametrize("names", [("boot", "training_pants", "training_shoe"), ("a", "__c"), ("a", "b-test", "c d")])
def test_class_folders_alone_are_all_read(names, tmp_path):
    folder = write(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))
    images = load_labeled_images(folder, "train")
    assert images.class_names == tuple(class_order(names))
    assert len(images) == 2 * len(names)
    assert len(load_labeled_images(folder, "train[:1]")) == 1
    with pytest.raises(InputError, match="has class folders alone, which are split 'train'; name one by --split"):
        load_labeled_images(folder, "test")


def test_class_folders_that_are_links_are_read(tmp_path):
    folder = write(tmp_path / "images", "a/1.png", "b/1.png")
    write(tmp_path, "elsewhere/1.png")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere")
    assert load_labeled_images(folder, "train").class_names == ("a", "b", "c")


def test_an_image_that_datasets_gives_to_no_split_is_named(tmp_path):
    folder = two_splits(tmp_path, "a", "b", splits=("train_images", "test_images"))
    write(tmp_path, "more/a/1.png")
    with pytest.raises(InputError, match=r"'more/a/1.png' of dataset .* would be left out: .* put all images"):
        load_labeled_images(folder, "train")


@pytest.mark.parametrize("split", ["", ".", "..", "train/", "./train", "train+", "[:2]"])
def test_a_split_without_a_name_is_refused(split, tmp_path):
    with pytest.raises(InputError, match="is no name of a split, expected one such as train"):
        load_labeled_images(two_splits(tmp_path, "a", "b"), split)


@pytest.mark.parametrize("loops", [{"a/up": ".."}, {"a/up": "..", "b/up": ".."}, {"a/self": "."}])
def test_a_link_to_a_folder_that_holds_it_is_refused(loops, tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    for name, target in loops.items():
        (tmp_path / "train" / name).symlink_to(target)
    with pytest.raises(InputError, match="is a link to a folder that holds it; remove the link"):
        load_labeled_images(folder, "train")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    os.rename(tmp_path / "train/a/train0.png", os.path.join(os.fsencode(tmp_path), b"train/a/caf\xe9.png"))
    with pytest.raises(InputError, match="has a name that is not UTF-8; rename it"):
        load_labeled_images(folder, "train")


@pytest.mark.parametrize("name", ["images.zip", "rows.parquet"])
def test_a_table_among_class_folders_is_refused(name, tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    (tmp_path / "train" / name).write_bytes(b"none")
    with pytest.raises(InputError, match=r"lies among the class folders of .*; move it elsewhere"):
        load_labeled_images(folder, "train")


def test_images_of_every_kind_that_pillow_opens_are_read(tmp_path):
    folder = two_splits(tmp_path, "a", "b")
    Image.new("RGB", (4, 4)).save(tmp_path / "train/a/x.avif")
    assert len(load_labeled_images(folder, "train")) == 5


@pytest.mark.parametrize("file", ["train/a/x.HEIC", "train/c/x.heif", "train/c/d/x.jxl", "test/c/x.hif"])
@pytest.mark.parametrize("labels", ["required", "optional", "ignored"])
def test_an_image_that_pillow_does_not_open_is_not_left_out_without_a_word(file, labels, tmp_path):
    """A class of nothing else would disappear."""
    folder, split = two_splits(tmp_path, "a", "b"), file.split("/")[0]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    (tmp_path / split / "a" / "._x.heic").write_bytes(b"x")  # macOS puts them beside files, hidden
    with pytest.raises(InputError, match=rf"{file}' is an image of a format that Pillow does not open here; convert"):
        load_labeled_images(folder, split, labels=labels)
    (tmp_path / file).unlink()
    assert len(load_labeled_images(folder, split, labels=labels)) == 4


def test_a_folder_called_as_the_digits_is_not_passed_over(tmp_path, monkeypatch):
    two_splits(tmp_path / "digits", "a", "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"a folder of that name here; give the folder as \./digits"):
        load_labeled_images("digits", "train")
    assert len(load_labeled_images("./digits", "train")) == 4
