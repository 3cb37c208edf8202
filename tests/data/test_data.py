"""Labelled images from every source: right pixels and labels, named errors, nothing replaced."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_parts import keys
from PIL import Image
from tiny_parts import noise_image

from timm_igkd.data.images import content_key
from timm_igkd.data.items import read_item
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError, MissingFileError


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_columns(folder, features: dict, split: str = "train", **columns) -> str:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(f"{folder}/{split}-0.parquet")
    return str(folder)


def test_parquet_folder_gives_image_label_and_class_names(tiny_images):
    found = load_labeled_images(str(tiny_images(n=6, classes=3)), "train")
    image, label = found[4]
    assert (image.mode, image.size, label) == ("RGB", (16, 16), 1)
    assert len(found) == 6
    assert found.class_names == ("class_0", "class_1", "class_2")


def test_folder_of_classes_holds_the_same_items_as_parquet(tiny_images):
    parquet = load_labeled_images(str(tiny_images(name="a")), "train")
    folder = load_labeled_images(str(tiny_images(kind="folder", name="b")), "train")
    assert folder.class_names == parquet.class_names
    assert sorted(zip(keys(folder), folder.labels.tolist(), strict=True)) == sorted(
        zip(keys(parquet), parquet.labels.tolist(), strict=True)
    )


@pytest.mark.parametrize("with_splits", [True, False])
def test_save_to_disk_holds_the_same_items_as_parquet(tiny_images, tmp_path, with_splits):
    rows = datasets.load_dataset(str(tiny_images()), split="train")
    saved = datasets.DatasetDict({"train": rows}) if with_splits else rows
    saved.save_to_disk(str(tmp_path / "saved"))
    assert keys(load_labeled_images(str(tmp_path / "saved"), "train")) == keys(
        load_labeled_images(str(tmp_path / "images"), "train")
    )


def test_splits_of_one_folder_differ(tiny_images):
    tiny_images()
    folder = str(tiny_images(split="test", n=4))
    assert len(load_labeled_images(folder, "test")) == 4
    assert not set(keys(load_labeled_images(folder, "test"))) & set(keys(load_labeled_images(folder, "train")))


def test_digits_splits_have_their_sizes_are_disjoint_and_stratified():
    splits = {split: load_labeled_images("digits", split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 1257, "validation": 180, "test": 360}
    found = {split: set(keys(part)) for split, part in splits.items()}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]
    assert all(np.ptp(np.bincount(part.labels)) <= 10 for part in splits.values())
    image, label = splits["test"][0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert splits["test"].class_names[label] == str(label)


def test_subset_keeps_order_and_names(tiny_images):
    found = load_labeled_images(str(tiny_images()), "train")
    part = found.subset([5, 2])
    assert keys(part) == [keys(found)[5], keys(found)[2]]
    assert [content_key(image) for image, _ in found.read_each([5, 2])] == keys(part)
    assert (part.name, part.split, part.class_names) == (found.name, found.split, found.class_names)


def test_transform_is_applied_to_items_but_not_to_what_maps_are_bound_to(tiny_images):
    found = load_labeled_images(str(tiny_images()), "train")
    found.transform = lambda image: image.resize((4, 4))
    assert found[0][0].size == (4, 4)
    assert read_item(found, 0)[0].size == (16, 16)


def test_labels_are_read_without_images(tiny_images):
    found = load_labeled_images(str(tiny_images(n=5, classes=2)), "train")
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.num_classes == 2


def test_first_image_and_class_label_columns_are_found(tmp_path):
    kinds = {
        "id": datasets.Value("int64"),
        "picture": datasets.Image(),
        "mask": datasets.Image(),
        "kind": datasets.ClassLabel(names=["a", "b"]),
        "finer": datasets.ClassLabel(names=["x", "y", "z"]),
    }
    folder = write_columns(
        tmp_path / "d", kinds, id=[7], picture=[noise_image(0)], mask=[noise_image(1)], kind=[1], finer=[2]
    )
    found = load_labeled_images(folder, "train")
    assert keys(found) == [content_key(noise_image(0))]
    assert (found[0][1], found.class_names) == (1, ("a", "b"))


def test_columns_can_be_named(tmp_path):
    kinds = {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "number": datasets.Value("int32"),
    }
    folder = write_columns(
        tmp_path / "d", kinds, image=[noise_image(0)] * 2, mask=[noise_image(1)] * 2, label=[1, 0], number=[0, 3]
    )
    found = load_labeled_images(folder, "train", image_column="mask", label_column="number")
    assert keys(found) == [content_key(noise_image(1))] * 2
    assert found.labels.tolist() == [0, 3]
    assert (found.class_names, found.num_classes) == (None, 4)


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_images_that_are_columns_of_bytes_are_read(kind, tmp_path):
    cells = [png(noise_image(seed)) for seed in range(3)]
    values = {
        "struct": pa.array([{"bytes": cell, "path": None} for cell in cells]),
        "binary": pa.array(cells, pa.binary()),
        "large_binary": pa.array(cells, pa.large_binary()),
    }
    table = pa.table({"id": [b"x"] * 3, "img": values[kind], "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "train.parquet")
    options = {"label_column": "label"} | ({} if kind == "struct" else {"image_column": "img"})
    found = load_labeled_images(str(tmp_path), "train", **options)
    assert keys(found) == [content_key(noise_image(seed)) for seed in range(3)]
    assert len(found.content_hash()) == 32
    if kind == "binary":
        with pytest.raises(
            InputError, match=r"no Image column among .*; name one of \['id', 'img'\] with --image-column"
        ):
            load_labeled_images(str(tmp_path), "train", label_column="label")
        others = load_labeled_images(str(tmp_path), "train", image_column="id", label_column="label")
        with pytest.raises(InputError, match=r"image 0 of .* cannot be decoded"):
            others[0]


def test_paths_are_no_images_and_the_remedy_says_what_would_be(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(
        InputError, match=r"give it one image per row as .*cast_column .*, and name it with --image-column"
    ):
        load_labeled_images(str(tmp_path), "train", label_column="label")


def test_unknown_column_offers_the_nearest(tiny_images):
    with pytest.raises(InputError, match=r"no column 'imag' \(did you mean 'image'\?\); its columns are"):
        load_labeled_images(str(tiny_images()), "train", image_column="imag")


def test_column_of_the_wrong_type_names_its_flag(tiny_images):
    with pytest.raises(
        InputError, match=r"column 'label'.*expected one image per row .*; name another with --image-column"
    ):
        load_labeled_images(str(tiny_images()), "train", image_column="label")
    with pytest.raises(
        InputError, match=r"column 'image'.*expected one class per image .*; name another with --label-column"
    ):
        load_labeled_images(str(tiny_images()), "train", label_column="image")


def test_missing_label_column_names_its_flag(tmp_path):
    kinds = {"image": datasets.Image(), "number": datasets.Value("int64")}
    folder = write_columns(tmp_path / "d", kinds, image=[noise_image(0)], number=[1])
    with pytest.raises(InputError, match=r"no ClassLabel column among.*--label-column"):
        load_labeled_images(folder, "train")


@pytest.mark.parametrize("folder", ["./nowhere", "path/to/nowhere"])  # no Hub id has two slashes
def test_missing_folder_is_an_error(folder):
    with pytest.raises(MissingFileError, match=f"dataset folder '{folder}' does not exist"):
        load_labeled_images(folder, "train")


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no data"):
        load_labeled_images(str(tmp_path), "train")


@pytest.mark.parametrize("kind", ["parquet", "folder", "digits"])
def test_unknown_split_names_the_splits(tiny_images, kind):
    name = "digits" if kind == "digits" else str(tiny_images(kind=kind))
    with pytest.raises(InputError, match=r"'tset'.*train"):
        load_labeled_images(name, "tset")


def test_unknown_split_of_save_to_disk_names_the_splits(tiny_images, tmp_path):
    datasets.load_dataset(str(tiny_images()), split="train").save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"'tset'.*train"):
        load_labeled_images(str(tmp_path / "saved"), "tset")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_cut_parquet_is_an_error(tiny_images, part):
    folder = tiny_images()
    (file,) = folder.glob("*.parquet")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(InputError, match="images"):
        load_labeled_images(str(folder), "train")


def test_corrupt_image_in_a_class_folder_is_named(tiny_images):
    folder = tiny_images(kind="folder")
    (folder / "train" / "class_1" / "0003.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    found = load_labeled_images(str(folder), "train")
    with pytest.raises(InputError, match=r"image \d+ \(0003\.png\) of .* split 'train' cannot be decoded"):
        keys(found)


def test_corrupt_image_in_parquet_is_named(tmp_path):
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    cells = [{"bytes": png(noise_image(0)), "path": None}, {"bytes": png(noise_image(1))[:60], "path": "b.png"}]
    found = load_labeled_images(write_columns(tmp_path / "d", kinds, image=cells, label=[0, 0]), "train")
    assert found[0][1] == 0
    with pytest.raises(InputError, match=r"image 1 \(b\.png\) of .* cannot be decoded"):
        found[1]


@pytest.mark.parametrize("column", ["image", "label"])
def test_missing_cell_is_named(tmp_path, column):
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    columns = {"image": [noise_image(0), noise_image(1)], "label": [0, 0]}
    columns[column][1] = None
    found = load_labeled_images(write_columns(tmp_path / "d", kinds, **columns), "train")
    with pytest.raises(InputError, match=f"image 1 of .* has no {column}"):
        found[1]


def test_deleted_file_is_named(tiny_images):
    folder = tiny_images(kind="folder")
    found = load_labeled_images(str(folder), "train")
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(InputError, match=r"image 0 \(.*png\) of .* cannot be read \(No such file"):
        found[0]


def write_parquet(path, names):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [noise_image(seed, 8, 8) for seed in range(4)]
    datasets.Dataset.from_dict({"image": images, "label": [0, 0, 1, 1]}, features=features).to_parquet(path)


@pytest.mark.parametrize("was_read_before", [False, True])
@pytest.mark.parametrize("split", ["test", "test[:3]", "test[50%:]"])
def test_a_split_has_the_class_names_of_its_own_files(split, was_read_before, tmp_path):
    """`datasets` gives all splits those of the first, and keeps them in its cache."""
    write_parquet(tmp_path / "train.parquet", ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", ["dog", "cat"])
    if was_read_before:
        datasets.load_dataset(str(tmp_path))
    assert load_labeled_images(str(tmp_path), split).class_names == ("dog", "cat")
    with pytest.raises(InputError, match="have other columns or classes, or these in another order; name one of them"):
        load_labeled_images(str(tmp_path), "train+test")


def test_splits_of_equal_classes_can_be_added(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", ["cat", "dog"])
    assert load_labeled_images(str(tmp_path), "train[:1]+test").labels.tolist() == [0, 0, 0, 1, 1]


def test_files_of_splits_in_upper_case_are_not_read_as_one(tmp_path):
    for split in ("Train", "Test"):
        write_parquet(tmp_path / f"{split}.parquet", ["cat", "dog"])
    with pytest.raises(InputError, match=r"'Test.parquet' of dataset .* would be part of split 'train': .*; rename it"):
        load_labeled_images(str(tmp_path), "train")


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n"


def folder_with_card(folder: Path, labels: list[int]) -> Path:
    """Write a folder as a download of the Hub leaves it: a card names the files."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [noise_image(label, 4, 4) for label in labels], "label": labels}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    (folder / "README.md").write_text(CARD)
    return folder


def test_folders_of_one_name_and_card_are_read_each_for_itself(tmp_path):
    """`datasets` prepares the rows of the first alone."""
    first, second = (folder_with_card(tmp_path / name / "images", [label]) for label, name in enumerate("ab"))
    assert [load_labeled_images(str(folder), "train").labels.tolist() for folder in (first, second)] == [[0], [1]]


def test_files_that_a_card_names_are_read_as_they_are_now(tmp_path):
    folder = folder_with_card(tmp_path / "images", [0, 1, 0])
    assert load_labeled_images(str(folder), "train").labels.tolist() == [0, 1, 0]
    folder_with_card(folder, [1])
    assert load_labeled_images(str(folder), "train").labels.tolist() == [1]
