"""Images without labels: found in any folder, told from class folders, never a label by accident."""

import datasets
import pytest
from tiny_parts import noise_image

from timm_igkd import load_labeled_images
from timm_igkd.data.labels import UNLABELED
from timm_igkd.data.unlabeled import MixedImages, load_unlabeled_beside, load_unlabeled_images
from timm_igkd.errors import InputError, MissingFileError


def save(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(folder / name)
    return folder


def files_of(images) -> list[str]:
    return [images.row_name(index).split("(")[1].split(")")[0] for index in range(len(images))]


def test_folder_gives_its_images_at_any_depth_in_the_order_of_their_paths(tmp_path):
    folder = save(tmp_path / "a[b]", "z.png", "test/b.JPG", "test/deep/c.png", "notes.png.d/.hidden.png")
    (folder / "readme.txt").write_text("no image")
    images = load_unlabeled_images(str(folder))
    assert files_of(images) == ["b.JPG", "c.png", "z.png"]
    assert images.labels.tolist() == [UNLABELED] * 3
    assert [images.read(index)[1] for index in range(3)] == [UNLABELED] * 3


def test_split_of_a_folder_is_a_folder_in_it(tmp_path):
    folder = save(tmp_path / "images", "train/a.png", "extra/b.png")
    assert files_of(load_unlabeled_images(str(folder), "extra")) == ["b.png"]


def test_labels_of_parquet_are_not_looked_at(tiny_images):
    folder = tiny_images(n=6)
    assert load_unlabeled_images(str(folder)).labels.tolist() == [UNLABELED] * 6


def test_parquet_without_labels_is_taken(tmp_path):
    rows = {"image": [noise_image(0), noise_image(1)], "number": [3, 4]}
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train-0.parquet"))
    assert len(load_unlabeled_images(str(tmp_path))) == 2


def test_digits_are_taken_without_their_labels():
    assert set(load_unlabeled_images("digits", "validation").labels.tolist()) == {UNLABELED}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent/./folder", MissingFileError, "does not exist"),
        ("torch/cifar10", InputError, "got timm's torch/cifar10"),
        (".", InputError, "holds no images"),
    ],
)
def test_what_holds_no_images_is_refused(name, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_unlabeled_images(name)


def test_split_without_class_folders_has_no_labels_and_the_one_beside_it_keeps_its_own(tmp_path):
    folder = save(tmp_path / "images", "train/a.png", "train/b.png", "test/dog/a.png", "test/cat/b.png")
    train = load_labeled_images(str(folder), "train", labels="optional")
    test = load_labeled_images(str(folder), "test")
    assert not train.has_labels
    assert len(train) == 2
    assert (test.class_names, test.labels.tolist()) == (("cat", "dog"), [0, 1])


def test_optional_labels_are_read_where_they_are(tiny_images):
    assert load_labeled_images(str(tiny_images(n=4)), "train", labels="optional").labels.tolist() == [0, 1, 0, 1]


def test_numbers_that_may_be_labels_are_asked_for(tmp_path):
    rows = {"image": [noise_image(0)], "digit": [3]}
    features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train-0.parquet"))
    with pytest.raises(InputError, match=r"name one of \['digit'\] with --label-column"):
        load_labeled_images(str(tmp_path), "train", labels="optional")


def test_mixed_images_are_the_labelled_ones_then_the_others(tiny_images, tmp_path):
    labeled = load_labeled_images(str(tiny_images(n=4)), "train")
    mixed = MixedImages(labeled, load_unlabeled_images(str(save(tmp_path / "more", "a.png"))))
    assert mixed.labels.tolist() == [0, 1, 0, 1, UNLABELED]
    assert (mixed.class_names, mixed.num_classes) == (labeled.class_names, 2)
    assert mixed.content_hash() != labeled.content_hash()


def parquet(folder, *columns):
    """Return a folder of parquet with a column of images each, whose images differ from column to column."""
    rows = {name: [noise_image(10 * number + seed) for seed in range(3)] for number, name in enumerate(columns)}
    features = datasets.Features({name: datasets.Image() for name in columns})
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (("mask", "photo"), None, "mask"),
        (("mask", "photo"), "photo", "photo"),
        (("mask", "other"), "photo", "mask"),
    ],
)
def test_column_of_the_labelled_images_is_theirs_too_where_they_have_it(columns, named, expected, tmp_path):
    images = load_unlabeled_beside(str(parquet(tmp_path / "images", *columns)), None, named)
    seed = 10 * columns.index(expected)
    assert images.read(0)[0].tobytes() == noise_image(seed).tobytes()


def test_folder_of_images_beside_a_named_column_has_none(tmp_path):
    assert len(load_unlabeled_beside(str(save(tmp_path / "images", "a.png")), None, "photo")) == 1
    assert len(load_unlabeled_beside("digits", None, "photo")) == 1257
