"""Outputs are not put where a data set would take them for its own files."""

from pathlib import Path

import datasets
import pytest
from tiny_parts import ImageList, noise_image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import EuroSAT, ImageFolder

from timm_igkd.data.items import refuse_among_images
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError

AMONG = r"lies among the images of .*; name another"


def write_rows(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"image": [noise_image(0), noise_image(1)], "label": [0, 1]})
    rows.to_parquet(path)


def write_classes(folder: Path) -> None:
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        noise_image(number).save(folder / name / "0.png")


def flat(folder: Path) -> None:
    for number in range(2):
        noise_image(number).save(folder / f"{number}.png")


def described(folder: Path) -> None:
    flat(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "of": 0}\n{"file_name": "1.png", "of": 1}\n')


def table(folder: Path) -> None:
    write_rows(folder / "train.parquet")


def sharded(folder: Path) -> None:
    write_rows(folder / "data" / "train-00000-of-00001.parquet")


def carded(folder: Path) -> None:
    write_rows(folder / "rows.parquet")
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.parquet\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n# Images\n")


def saved(folder: Path) -> None:
    datasets.Dataset.from_dict({"image": [noise_image(0)], "label": [0]}).save_to_disk(folder)


@pytest.mark.parametrize("name", ["images", "a [1]"])
@pytest.mark.parametrize(
    ("write", "refused", "allowed"),
    [
        (flat, ["maps", "runs/maps", "grid.png"], []),
        (described, ["maps", "grid.png"], []),
        (table, ["maps", "runs/maps", "grid.png", "metrics.json"], []),
        (sharded, ["data/maps"], ["maps", "grid.png"]),
        (carded, [], ["maps", "grid.png"]),
        (saved, [], ["maps", "grid.png"]),
    ],
)
def test_an_output_in_a_folder_that_datasets_looks_through_is_refused(write, refused, allowed, name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    write(folder)
    found = load_labeled_images(str(folder), "train", labels="ignored")
    before = len(found)
    for out in refused:
        with pytest.raises(InputError, match=AMONG):
            refuse_among_images(found, folder / out, "name another")
    refuse_among_images(found, tmp_path / "maps", "name another")
    for out in allowed:  # and the images are the same with what would be there
        refuse_among_images(found, folder / out, "name another")
        if out.endswith("png"):
            noise_image(9).save(folder / out)
        else:
            write_rows(folder / out / "data" / "train-00000-of-00001.parquet")
        assert len(load_labeled_images(str(folder), "train", labels="ignored")) == before


@pytest.mark.parametrize("labels", ["required", "ignored"])
@pytest.mark.parametrize("name", ["images", "a [1]"])
def test_an_output_among_class_folders_is_refused_however_it_is_spelled(name, labels, tmp_path, monkeypatch):
    write_classes(tmp_path / "elsewhere")
    train = tmp_path / name / "train"
    train.mkdir(parents=True)
    for linked in "ab":
        (train / linked).symlink_to(tmp_path / "elsewhere" / linked)
    (tmp_path / "link").symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = load_labeled_images(name, "train", labels=labels)
    for out in (train / "a" / "x.png", "link/train/a", Path(name) / "train" / "x", f"./{name}/train"):
        with pytest.raises(InputError, match=AMONG):
            refuse_among_images(found, out, "name another")
    refuse_among_images(found, tmp_path / name / "maps", "name another")


def test_an_output_in_a_folder_that_another_library_looks_through_is_refused(tmp_path):
    write_classes(tmp_path / "images")
    write_classes(tmp_path / "downloads" / "eurosat" / "2750")
    timms = load_labeled_images("folder/", "train", data_dir=str(tmp_path / "images"))
    for found in (timms, ImageFolder(str(tmp_path / "images"))):
        with pytest.raises(InputError, match=AMONG):
            refuse_among_images(found, tmp_path / "images" / "a" / "grid.png", "name another")
        refuse_among_images(found, tmp_path / "grid.png", "name another")
    with_a_root = EuroSAT(str(tmp_path / "downloads"))
    with pytest.raises(InputError, match=AMONG):
        refuse_among_images(with_a_root, tmp_path / "downloads" / "eurosat" / "2750" / "c", "name another")
    refuse_among_images(with_a_root, tmp_path / "downloads" / "maps", "name another")


def test_a_file_among_the_images_of_any_part_is_refused(tmp_path):
    write_classes(tmp_path / "images")
    foldered = load_labeled_images(str(tmp_path / "images"), "train")
    listed = ImageList([noise_image(0)], [0], "named")
    listed.folder = 3  # of its own, whatever it means
    joined = Subset(ConcatDataset([listed, foldered]), [0])
    with pytest.raises(InputError, match=AMONG):
        refuse_among_images(joined, tmp_path / "images" / "grid.png", "name another")
    refuse_among_images(joined, tmp_path / "grid.png", "name another")
