"""Members of tars that timm's streaming reader leaves out are named once and counted; what else fails is an error."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data import IterableImageDataset, create_dataset
from tiny_parts import noise_image, png, write_tar
from torch.utils.data import DataLoader

from timm_igkd.data import streams
from timm_igkd.data.streams import StreamReader
from timm_igkd.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves the tars it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]
IMAGES = [png(noise_image(seed)) for seed in range(8)]


def tars(root: Path, damaged: dict[int, tuple[bytes, str]], shards: int = 2) -> Path:
    """Write 8 images in shards; `damaged` replaces (image, .cls) of some."""
    members = [damaged.get(index, (image, str(index % 2))) for index, image in enumerate(IMAGES)]
    size = len(members) // shards
    for shard in range(shards):
        write_tar(root / f"train-{shard}.tar", members[shard * size : (shard + 1) * size], shard * size)
    return root


def reader_of(root: Path, shards: int = 2, count: int = 8, **options: Any) -> StreamReader:
    split = f"train-{{0..{shards - 1}}}.tar|{count}"
    return StreamReader(create_dataset("wds/", root=str(root), split=split, is_training=True, **options), "tars")


class Read(IterableImageDataset):
    """A stream as a loader reads it."""

    def __init__(self, images: StreamReader):
        super().__init__(None, reader=images.dataset.reader)
        self.images = images

    def __iter__(self):
        return iter(self.images)


CUT = (IMAGES[1][:200], "1")
DAMAGED = {
    "a cut image": (CUT, "image file is truncated"),
    "no image": ((b"none", "1"), "cannot identify image file"),
    "a label in words": ((IMAGES[1], "cat"), "invalid literal for int() with base 10: b'cat'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_an_unreadable_member_is_left_out_named_and_counted(tmp_path, capsys, case):
    member, reason = DAMAGED[case]
    images = reader_of(tars(tmp_path, {1: member}), count=7)
    assert len(list(images)) == 7
    assert images.num_unreadable == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-igkd")]
    assert lines == [f"timm-igkd: 0001 in train-0.tar of 'tars' cannot be read ({reason}); timm leaves it out"]


def test_a_member_without_a_label_says_so(tmp_path, capsys):
    with tarfile.open(tars(tmp_path, {}) / "train-0.tar", "a") as tar:
        tar.add(__file__, "0009.png")
    list(reader_of(tmp_path))
    assert (
        "0009 in train-0.tar of 'tars' cannot be read (it has no .cls); timm leaves it out" in capsys.readouterr().err
    )


def test_a_member_is_counted_once_however_often_it_comes(tmp_path, capsys):
    images = reader_of(tars(tmp_path, {1: CUT, 6: CUT}), count=30)
    for _ in range(2):
        list(images)
    assert images.num_unreadable == 2
    assert capsys.readouterr().err.count("timm leaves it out") == 2


def test_a_later_pass_that_can_read_nothing_is_an_error_too(tmp_path):
    path = tars(tmp_path, {}, shards=1) / "train-0.tar"
    images = reader_of(tmp_path, shards=1)
    assert len(list(images)) == 8
    path.unlink()
    with pytest.raises(InputError, match="stream 'tars' gave no image"):
        list(images)


def test_members_of_equal_names_in_two_folders_are_two(tmp_path, capsys):
    for folder in ("a", "b"):
        tars(tmp_path / folder, {1: CUT}, shards=1)
    images = StreamReader(
        create_dataset("wds/", root=str(tmp_path), split="{a,b}/train-0.tar|14", is_training=True), "x"
    )
    list(images)
    assert images.num_unreadable == 2
    assert capsys.readouterr().err.count("timm-igkd: 0001 in train-0.tar of 'x' cannot be read") == 2


def test_no_more_than_ten_members_are_named(tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", [(IMAGES[0], "0")] + [CUT] * 15)
    images = reader_of(tmp_path, shards=1, count=2)
    list(images)
    assert images.num_unreadable == 15
    assert capsys.readouterr().err.count("timm leaves it out") == 10


def test_workers_tell_the_main_process_what_they_could_not_read(tmp_path):
    stream = Read(reader_of(tars(tmp_path, {1: CUT, 6: CUT}), count=12))
    stream.set_loader_cfg(2)
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=list)
    for _ in range(2):
        assert len(list(loader)) == 12
    assert stream.images.num_unreadable == 2


def test_a_cut_tar_is_named(tmp_path, capsys):
    path = tars(tmp_path, {}) / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3500])
    images = reader_of(tmp_path, count=5)
    list(images)
    assert images.num_unreadable == 1
    assert "timm-igkd: train-1.tar of 'tars' cannot be read (unexpected end of data); timm" in capsys.readouterr().err


def test_a_missing_tar_is_named(tmp_path, capsys):
    tars(tmp_path, {})
    images = reader_of(tmp_path, shards=3)
    list(images)
    assert images.num_unreadable == 1
    assert (
        "train-2.tar of 'tars' cannot be read (No such file or directory); timm leaves it out"
        in capsys.readouterr().err
    )


def test_a_worker_without_a_tar_is_no_error_where_another_could_not_read_a_member(tmp_path):
    write_tar(tmp_path / "train-0.tar", [CUT] + [(image, "0") for image in IMAGES])
    stream = Read(reader_of(tmp_path, shards=1))
    assert stream.images.first() is not None
    assert stream.images.num_unreadable == 1
    stream.set_loader_cfg(2)
    assert len(list(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=list))) == 4  # the share of one of two


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("/data/my tars/train-0.tar", "train-0.tar"),
        ("https://host/a/train-0.tar?X-Amz-Signature=abc", "train-0.tar"),
        ("pipe:curl -s -L https://host/a/train-0.tar -H 'Authorization:Bearer hf_secretsecret'", "train-0.tar"),
        ("pipe:cat", "a shard"),
    ],
)
def test_a_tar_is_named_without_what_stands_behind_it(shard, name):
    assert streams._tar_name(shard) == name


@pytest.mark.parametrize("member", [(b"none", "0"), (IMAGES[0], "cat")])
def test_a_stream_of_unreadable_members_alone_is_an_error(tmp_path, member):
    write_tar(tmp_path / "train-0.tar", [member] * 3)
    with pytest.raises(InputError, match=r"stream 'tars' gave no image, timm could read none of its members; expected"):
        list(reader_of(tmp_path, shards=1))


def test_timms_reader_is_as_before(tmp_path):
    from timm.data.readers import reader_wds

    functions = reader_wds._decode, reader_wds.log_and_continue
    next(iter(reader_of(tars(tmp_path, {}))))
    assert (reader_wds._decode, reader_wds.log_and_continue) == functions


def test_an_unreadable_image_of_a_hub_stream_is_an_error(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = [{"bytes": IMAGES[0], "path": None}, {"bytes": b"none", "path": None}]
    datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features).to_parquet(
        str(tmp_path / "train.parquet")
    )
    stream = create_dataset(f"hfids/{tmp_path}", split="train", is_training=False, num_samples=2)
    with pytest.raises(InputError, match=r"image 1 of stream 'rows' cannot be read \(.*; repair or remove it"):
        list(StreamReader(stream, "rows"))


def test_the_labels_transform_is_applied(tmp_path):
    images = reader_of(tars(tmp_path, {}))
    images.dataset.target_transform = lambda label: label + 5
    assert {label for _, label in images} == {5, 6}


def test_the_first_item_is_that_of_the_first_shard(tmp_path):
    image, label = reader_of(tars(tmp_path, {})).first() or (None, None)
    assert np.array_equal(np.asarray(image), np.asarray(noise_image(0)))
    assert label == 0
