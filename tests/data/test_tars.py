"""Folders of webdataset tars, read by index: labels from .cls, class names from classes.txt."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_parts import noise_image, png, write_tar

from timm_igkd.data.items import class_names, read_item
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError

IMAGES = [png(noise_image(seed)) for seed in range(4)]


def tars(root: Path, labels: list[str], split: str = "train") -> Path:
    for shard in range(2):
        members = list(zip(IMAGES, labels, strict=True))[2 * shard : 2 * shard + 2]
        write_tar(root / f"{split}-{shard}.tar", members, 2 * shard)
    return root


def test_images_and_labels_are_those_of_the_members(tmp_path):
    images = load_labeled_images(str(tars(tmp_path, ["0", "2", "1", "0"])), "train")
    assert images.labels.tolist() == [0, 2, 1, 0]
    assert images.num_classes == 3
    for index in range(4):
        assert np.array_equal(np.asarray(images[index][0]), np.asarray(noise_image(index)))


def test_a_split_is_named_by_the_tars(tmp_path):
    tars(tmp_path, ["0"] * 4)
    tars(tmp_path, ["1"] * 4, "validation")
    assert set(load_labeled_images(str(tmp_path), "validation").labels) == {1}


def test_messages_name_the_member(tmp_path):
    images = load_labeled_images(str(tars(tmp_path, ["0"] * 4)), "train")
    assert images.row_name(3).startswith("image 3 (0003.png) of")


def test_members_of_another_format_are_told_with_what_to_do(tmp_path):
    members = list(zip(IMAGES * 3, ["0", "1"] * 6, strict=True))
    write_tar(tmp_path / "train-0.tar", members, 0)
    rewritten = tmp_path / "mixed" / "train-0.tar"
    rewritten.parent.mkdir()
    with tarfile.open(tmp_path / "train-0.tar") as there, tarfile.open(rewritten, "w") as here:
        for member in there:
            data = there.extractfile(member)
            if member.name.startswith("0010."):
                member.name = member.name.replace(".png", ".webp")
            here.addfile(member, data)
    images = load_labeled_images(str(rewritten.parent), "train")
    with pytest.raises(InputError, match=r"image 10 .* has no image; give all members .* as the first ones are \.png"):
        images[10]


def test_class_names_come_from_classes_txt(tmp_path):
    (tmp_path / "classes.txt").write_text("tench\nball 10\nball 2\n")
    images = load_labeled_images(str(tars(tmp_path, ["0", "2", "1", "0"])), "train")
    assert class_names(images) == ("tench", "ball 10", "ball 2")  # numbers count the lines, in no other order
    assert images.labels.tolist() == [0, 2, 1, 0]


def test_class_names_are_found_in_the_folders_of_the_splits(tmp_path):
    for split in ("train", "test"):
        tars(tmp_path / split, ["1"] * 4, split)
    (tmp_path / "train" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "classes.txt").write_text("of another tool\n")
    assert class_names(load_labeled_images(str(tmp_path), "test")) == ("cat", "dog")
    (tmp_path / "test" / "classes.txt").write_text("cat\ndog\n")
    assert class_names(load_labeled_images(str(tmp_path), "test")) == ("cat", "dog")
    (tmp_path / "test" / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match=r"test.classes.txt' and '.*train.classes.txt' name other classes; keep one"):
        load_labeled_images(str(tmp_path), "test")


def test_one_tar_without_a_split_in_its_name_beside_class_names_says_what_to_do(tmp_path):
    tars(tmp_path, ["1"] * 4).joinpath("train-0.tar").rename(tmp_path / "0.tar")
    for path in tmp_path.glob("train-*.tar"):
        path.unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"is taken for texts, .* by their split, as in train-0000.tar"):
        load_labeled_images(str(tmp_path), "train")


@pytest.mark.parametrize("text", ["cat\n\ndog\n", "cat\ndog\ncat\n"])
def test_class_names_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=r"classes.txt' has an empty line or a name twice, expected a name of its own"):
        load_labeled_images(str(tars(tmp_path, ["0"] * 4)), "train")


def test_a_label_beyond_classes_txt_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    images = load_labeled_images(str(tars(tmp_path, ["0", "1", "2", "0"])), "train")
    with pytest.raises(InputError, match=r"image 2 \(0002.png\) of .* has label 2, expected 0 to 1"):
        _ = images.labels


def test_a_class_in_words_is_refused_with_what_timm_reads(tmp_path):
    with pytest.raises(InputError, match=r"have 'cat' as a class, expected its number, .* names into classes.txt"):
        load_labeled_images(str(tars(tmp_path, ["cat", "dog", "cat", "dog"])), "train")


def test_another_column_of_whole_numbers_can_be_named(tmp_path):
    write_tar(tmp_path / "train-0.tar", [(image, "3") for image in IMAGES])
    images = load_labeled_images(str(tmp_path), "train", label_column="cls")
    assert set(images.labels) == {3}
    with pytest.raises(InputError, match=r"has no column 'clss' .did you mean 'cls'"):
        load_labeled_images(str(tmp_path), "train", label_column="clss")


def test_an_unreadable_member_is_an_error_that_names_it(tmp_path):
    write_tar(tmp_path / "train-0.tar", [(IMAGES[0], "0"), (IMAGES[1][:200], "1")])
    with pytest.raises(InputError, match=r"image 1 \(0001.png\) of .* cannot be decoded as an image"):
        read_item(load_labeled_images(str(tmp_path), "train"), 1)


def test_a_cut_tar_is_refused(tmp_path):
    path = tars(tmp_path, ["0"] * 4) / "train-1.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot be read \(.*\); a file is corrupt"):
        load_labeled_images(str(tmp_path), "train")


def test_class_names_may_begin_with_a_byte_order_mark_and_are_utf8(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    folder = str(tars(tmp_path, ["0", "1", "1", "0"]))
    assert load_labeled_images(folder, "train").class_names == ("cat", "dog")
    (tmp_path / "classes.txt").write_bytes("chat\nchat sauvage é\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"classes.txt' is not UTF-8 .*; save it as UTF-8"):
        load_labeled_images(folder, "train")


def test_an_image_whose_label_is_beyond_classes_txt_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    images = load_labeled_images(str(tars(tmp_path, ["0", "1", "2", "0"])), "train")
    with pytest.raises(InputError, match="has label 2, expected 0 to 1; correct the row"):
        images.read(2)
