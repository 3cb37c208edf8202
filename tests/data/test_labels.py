"""Labels are whole numbers in one order of classes, whatever folder, column or split they come from."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from tiny_parts import ImageList, noise_image

from timm_igkd import load_labeled_images
from timm_igkd.data.items import read_item
from timm_igkd.data.labels import class_order, label_table, readable_names, to_label
from timm_igkd.errors import InputError, InputTypeError


@pytest.mark.parametrize(
    "value",
    [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)],
)
def test_whole_numbers_of_any_kind_are_labels(value):
    label = to_label(value, "image 0")
    assert (label, type(label)) == (3, int)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)])
def test_bools_are_labels(value):
    assert to_label(value, "image 0") == 1


@pytest.mark.parametrize("value", [0.9, 1.5, float("nan"), float("inf"), np.float64(0.9), torch.tensor(0.9), 2**63])
def test_other_numbers_are_refused_not_rounded(value):
    with pytest.raises(InputError, match=r"image 0 has label .*, expected a whole number"):
        to_label(value, "image 0")


@pytest.mark.parametrize(
    ("value", "kind"),
    [("1", "str"), (None, "None"), ((1, 0), "tuple"), ([1], "list"), (torch.tensor([0, 1]), r"Tensor of shape \(2,\)")],
)
def test_anything_else_is_refused_by_its_type(value, kind):
    with pytest.raises(InputTypeError, match=f"image 0 has a label of type {kind}, expected a whole number"):
        to_label(value, "image 0")


@pytest.mark.parametrize("label", [0.9, "1", None, float("nan")])
def test_labels_of_any_dataset_are_checked(label):
    with pytest.raises((InputError, InputTypeError), match=r"image 0 of .* has"):
        read_item(ImageList([noise_image(0)], [label]), 0)


NAMES = [
    [str(number) for number in range(12)],
    [f"class_{number}" for number in range(1, 13)],
    ["b", "A", "c", "B2", "b10", "B1"],
    ["01", "2", "003", "10"],
    ["cat", "dog"],
]


def class_folders(root, names, split="train"):
    """Write one image a class, grey by the place of its class in timm's order."""
    for place, name in enumerate(class_order(names)):
        (root / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (place * 10,) * 3).save(root / split / name / "0.png")
    return root


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_class_folders_are_counted_as_timm_does(names, tmp_path):
    folder = class_folders(tmp_path / "images", names)
    ours = load_labeled_images(str(folder), "train")
    theirs = create_dataset("folder/", root=str(folder / "train"))
    assert list(ours.class_names) == sorted(theirs.reader.class_to_idx, key=theirs.reader.class_to_idx.get)
    labels = {image.getpixel((0, 0))[0] // 10: label for image, label in (ours[i] for i in range(len(ours)))}
    assert labels == {place: place for place in range(len(names))}
    assert sorted(ours.labels) == list(range(len(names)))
    assert ours.labels.tolist() == [ours[i][1] for i in range(len(ours))]


def test_equal_keys_of_timms_order_are_ordered_as_text():
    assert class_order(["01", "1"]) == ["01", "1"]
    assert class_order(["a", "A"]) == ["A", "a"]


def parquet(path, labels, names):
    path.parent.mkdir(exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [noise_image(label * 100 + i) for i, label in enumerate(labels)]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(path))


def test_split_is_brought_to_the_order_of_other_names(tmp_path):
    parquet(tmp_path / "images" / "test-0.parquet", [0, 1, 1], ["blue", "red"])
    images = load_labeled_images(str(tmp_path / "images"), "test")
    turned = images.in_class_order(("red", "blue"))
    assert turned.class_names == ("red", "blue")
    assert turned.labels.tolist() == [1, 0, 0] == [turned[i][1] for i in range(3)]
    assert images.labels.tolist() == [0, 1, 1]
    assert turned.in_class_order(("blue", "red")).labels.tolist() == [0, 1, 1]
    assert turned.subset([2, 0]).labels.tolist() == [0, 1]
    assert images.in_class_order(("green", "blue", "red")).labels.tolist() == [1, 2, 2]


def test_class_that_the_training_images_lack_is_named(tmp_path):
    parquet(tmp_path / "images" / "test-0.parquet", [0, 1, 2], ["red", "blue", "bleu"])
    images = load_labeled_images(str(tmp_path / "images"), "test")
    with pytest.raises(
        InputError, match=r"split 'test' of .* has class 'bleu', which .* lack \(did you mean 'blue'\?\)"
    ):
        images.in_class_order(("red", "blue"))


def test_each_split_keeps_its_own_class_names(tmp_path):
    """`datasets` gives all splits of a folder the names of the first: labels of other classes, without a word."""
    for split, names in (("train", ["red", "blue"]), ("test", ["blue", "red", "green"]), ("validation", ["red"])):
        parquet(tmp_path / "images" / f"{split}-0.parquet", [0] * 2, names)
        images = load_labeled_images(str(tmp_path / "images"), split)
        assert images.class_names == tuple(names)
    for split, names in (("train", ("red", "blue")), ("test", ("blue", "red", "green")), ("validation", ("red",))):
        assert load_labeled_images(str(tmp_path / "images"), split).class_names == names


def test_label_table_is_none_where_nothing_changes():
    assert label_table(["a", "b"], ["a", "b", "c"], "x") is None
    assert label_table(["b", "a"], ["a", "b"], "x").tolist() == [1, 0]


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_label_outside_of_the_classes_is_named_without_decoding(label, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [noise_image(i) for i in range(3)], "label": [0, label, 1]}, features)
    rows.to_parquet(str(tmp_path / "train-0.parquet"))
    images = load_labeled_images(str(tmp_path), "train", label_column="label")
    images.class_names = ("a", "b")
    with pytest.raises(InputError, match=rf"image 1 .* has label {label}, expected 0 to 1"):
        _ = images.labels


@pytest.mark.parametrize("label", [-1, -7, 2])
@pytest.mark.parametrize("names", ["none", "their own", "in another order", "among others", "among others in another"])
def test_a_row_of_no_class_is_refused_when_it_is_read(names, label, tmp_path):
    """-1 would say that the image has no label."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [noise_image(i) for i in range(3)], "label": [0, label, 1]}, features)
    rows.to_parquet(str(tmp_path / "train-0.parquet"))
    images = load_labeled_images(str(tmp_path), "train", label_column="label")
    if names == "none" and label > 0:
        assert images[1][1] == label  # one class more
        return
    images.class_names = None if names == "none" else ("a", "b")
    orders = {"in another order": "ba", "among others": "abcd", "among others in another": "bcda"}
    if names in orders:
        images = images.in_class_order(orders[names])
    expected = "a class counted from 0" if names == "none" else "0 to 1"
    message = rf"image 1 .* has label {label}, expected {expected}; correct"
    with pytest.raises(InputError, match=message):
        images.read(1)
    with pytest.raises(InputError, match=message):
        list(images.read_each([0, 1]))
    with pytest.raises(InputError, match=message):
        _ = images.labels


def test_row_without_a_label_is_named_without_decoding(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [noise_image(i) for i in range(3)], "label": [0, 1, None]}, features)
    rows.to_parquet(str(tmp_path / "train-0.parquet"))
    with pytest.raises(InputError, match=r"image 2 .* has no label; remove the row"):
        _ = load_labeled_images(str(tmp_path), "train").labels


# ---- options that would have no effect, and columns that are none ----


@pytest.mark.parametrize("option", ["image_column", "label_column", "revision"])
@pytest.mark.parametrize("name", ["digits", "folder/", "torch/cifar10"])
def test_options_without_effect_are_refused(name, option, tmp_path):
    flag = "--" + option.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} x has no effect on '{name}'"):
        load_labeled_images(name, "train", data_dir=str(tmp_path) if "/" in name else None, **{option: "x"})


def test_revision_of_a_local_folder_is_refused(tiny_images):
    with pytest.raises(InputError, match=r"--revision main has no effect on .*a local folder has no revisions"):
        load_labeled_images(str(tiny_images()), "train", revision="main")


def test_hfds_honours_columns_and_says_what_it_read(tiny_images, tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "coarse": datasets.ClassLabel(names=["x"]),
            "fine": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    columns = {"photo": [noise_image(i) for i in range(2)], "coarse": [0, 0], "fine": [1, 0]}
    (tmp_path / "user" / "images").mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "user" / "images" / "train-0.parquet"))
    monkeypatch.chdir(tmp_path)
    images = load_labeled_images("hfds/user/images", "train", label_column="fine")
    assert [images[i][1] for i in range(2)] == [1, 0]
    assert (images.name, images.image_column, images.class_names) == ("hfds/user/images", "photo", ("a", "b"))


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (datasets.Value("string"), ["a", "b"]),
        (datasets.Value("float32"), [0.0, 1.0]),
        (datasets.Value("bool"), [True, False]),
        (datasets.Sequence(datasets.Value("int64")), [[0, 1], [1, 1]]),
    ],
    ids=["string", "float", "bool", "multi-label"],
)
def test_column_that_holds_no_classes_says_what_a_label_is(feature, values, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = datasets.Dataset.from_dict({"image": [noise_image(0), noise_image(1)], "label": values}, features)
    rows.to_parquet(str(tmp_path / "train-0.parquet"))
    wanted = "one class per image as ClassLabel or whole number"
    with pytest.raises(InputError, match=rf"column 'label' of .* expected {wanted}"):
        load_labeled_images(str(tmp_path), "train", label_column="label")
    with pytest.raises(InputError, match=rf"no ClassLabel column among \['image', 'label'\]; give it {wanted}"):
        load_labeled_images(str(tmp_path), "train")


def test_column_of_whole_numbers_is_offered(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [noise_image(0)], "digit": [3]}, features).to_parquet(
        str(tmp_path / "train-0.parquet")
    )
    with pytest.raises(InputError, match=r"name one of \['digit'\] with --label-column"):
        load_labeled_images(str(tmp_path), "train")


@pytest.mark.parametrize("layout", ["train/0.png", "train/only/0.png"])
def test_images_without_class_folders_are_told_where_they_belong(layout, tmp_path):
    for index in range(2):
        path = tmp_path / "images" / layout.replace("0", str(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(index).save(path)
    with pytest.raises(InputError, match="have no labels, expected a folder for each of two classes or more"):
        load_labeled_images(str(tmp_path / "images"), "train")


def test_wordnet_ids_are_shown_in_imagenets_words():
    assert readable_names(["n01440764", "my fish", "n99999999"]) == ["tench", "my fish", "n99999999"]
    assert readable_names(["cat", "dog"]) == ["cat", "dog"]
    assert readable_names(["n02012849", "n03126707"]) == ["crane (n02012849)", "crane (n03126707)"]
