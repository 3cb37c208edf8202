"""A store that is there is kept for the images and labels it was made of, and refused for any other."""

import json
import shutil

import pytest
from store_parts import files_of
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd import compute_maps, load_labeled_images
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.errors import InputError
from timm_igkd.maps import build as build_module
from timm_igkd.maps import shard_builder
from timm_igkd.maps.build import check_teacher, recompute_rows
from timm_igkd.maps.store import MapStore

OPTIONS = IGOptions(n_steps=1)


def build(dataset, out, **more):
    return compute_maps(tiny_teacher(classes=2, size=16), dataset, out, options=OPTIONS, progress=False, **more)


def test_a_store_that_names_no_interpolation_is_of_a_teacher_that_resizes_bilinearly(tmp_path):
    """So were the images of a teacher without an entry resized, before they were as timm does it: bicubically."""
    images, out = ImageList([noise_image(i, 24, 24) for i in range(2)], [0, 1]), tmp_path / "maps"
    bilinear, silent = (tiny_teacher(classes=2, size=16) for _ in range(2))
    bilinear.pretrained_cfg["interpolation"], silent.pretrained_cfg["interpolation"] = "bilinear", None
    assert compute_maps(bilinear, images, out, options=OPTIONS, progress=False) is not None
    for file in (out / "manifest.json", out / "provenance.json"):
        content = json.loads(file.read_text())
        assert content["teacher"]["interpolation"] == "bilinear"
        content["teacher"]["interpolation"] = None
        file.write_text(json.dumps(content))
    check_teacher(MapStore(out).provenance, bilinear)
    assert compute_maps(bilinear, images, out, options=OPTIONS, progress=False) is not None
    with pytest.raises(InputError, match=r"interpolation .*bilinear.*bicubic"):
        check_teacher(MapStore(out).provenance, silent)
    with pytest.raises(InputError, match=r"interpolation .*bilinear.*bicubic"):
        recompute_rows(MapStore(out), silent, images, 1)
    with pytest.raises(InputError, match=r"teacher\.interpolation is 'bilinear' there, 'bicubic' here"):
        compute_maps(silent, images, out, options=OPTIONS, progress=False)
    found = compute_maps(silent, images, tmp_path / "new", options=OPTIONS, progress=False)
    assert found is not None
    assert found.provenance.teacher.interpolation == "bicubic"


def test_the_same_teacher_by_another_name_goes_on(tmp_path):
    """`local-dir:teacher` in a command, `local-dir:/a/teacher/` in the next, its architecture in Python."""
    images, out = ImageList([noise_image(i, 24, 24) for i in range(2)], [0, 1]), tmp_path / "maps"
    assert build(images, out, teacher_name="local-dir:teacher") is not None
    before = files_of(out)
    for name in ("local-dir:./teacher/", None):
        assert build(images, out, teacher_name=name) is not None
    assert files_of(out) == before


def changed(images, index, what):
    if what == "pixel":
        images.images[index].putpixel((0, 0), (1, 2, 3))
    else:
        images.labels[index] = 1 - images.labels[index]


@pytest.mark.parametrize("what", ["pixel", "label"])
@pytest.mark.parametrize("index", [0, 3, 7])
def test_any_dataset_with_one_other_item_is_refused(index, what, tmp_path):
    images = ImageList([noise_image(i, 16, 16) for i in range(8)], [i % 2 for i in range(8)])
    assert build(images, tmp_path / "maps") is not None
    assert build(images, tmp_path / "maps") is not None
    changed(images, index, what)
    with pytest.raises(InputError, match=rf"holds maps of other data: row {index} is not"):
        build(images, tmp_path / "maps")


@pytest.mark.parametrize("order", [[0, 1, 2, 4, 3, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7]])
def test_labelled_images_in_another_order_are_refused(order, tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images()), "train")
    assert build(images, tmp_path / "maps") is not None
    assert build(load_labeled_images(str(tiny_images()), "train"), tmp_path / "maps") is not None
    with pytest.raises(InputError, match=r"holds maps of other data: row \d is not"):
        build(images.subset(order), tmp_path / "maps")


def test_repaired_image_lets_the_build_go_on(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images("folder")), "train")
    build(images.subset([0, 1, 2, 3]), tmp_path / "first")
    store = build(images, tmp_path / "maps")
    assert store is not None
    (tmp_path / "maps" / "provenance.json").unlink()
    (file,) = (tmp_path / "images" / "train" / "class_1").glob("0007.png")
    noise_image(99, 16, 16).save(file)
    for shard in sorted((tmp_path / "maps" / "data").glob("*.parquet")):
        shard.unlink()
    again = load_labeled_images(str(tmp_path / "images"), "train")
    rebuilt = build(again, tmp_path / "maps")
    assert rebuilt is not None
    rebuilt.verify(again)
    assert rebuilt.provenance.dataset.content_hash == again.content_hash()


@pytest.fixture
def machine(tiny_images, tmp_path):
    """Return `build(i)`, which builds the i-th of three shards of four rows, as another machine would."""
    tiny_images("folder", n=12)

    def build_shard(shard):
        images = load_labeled_images(str(tmp_path / "images"), "train")
        return build(images, tmp_path / "maps", shard=(shard, 3), shard_size=4)

    return build_shard


def test_image_that_changed_after_another_machine_built_its_shard_is_noticed_at_the_end(machine, tmp_path):
    assert machine(0) is None
    noise_image(99, 16, 16).save(tmp_path / "images" / "train" / "class_0" / "0002.png")  # row 1, inside shard 0
    assert machine(1) is None
    with pytest.raises(InputError, match="holds maps of other data: row 1 is not"):
        machine(2)
    assert not (tmp_path / "maps" / "provenance.json").exists()


def test_shards_that_are_copied_together_are_held_against_the_images(tiny_images, tmp_path):
    tiny_images("folder", n=12)

    def build_shard(shard, out):
        images = load_labeled_images(str(tmp_path / "images"), "train")
        return build(images, tmp_path / out, shard=shard, shard_size=4)

    assert build_shard((0, 3), "first") is None
    noise_image(99, 16, 16).save(tmp_path / "images" / "train" / "class_0" / "0002.png")  # row 1, inside shard 0
    assert build_shard((1, 3), "second") is build_shard((2, 3), "second") is None
    (shard,) = (tmp_path / "first" / "data").glob("*.parquet")
    shutil.copy(shard, tmp_path / "second" / "data")
    with pytest.raises(InputError, match="holds maps of other data: row 1 is not"):
        build_shard((0, 1), "second")


def test_shard_that_another_call_put_there_meanwhile_is_held_against_the_images(machine, tmp_path, monkeypatch):
    assert machine(1) is None
    file = tmp_path / "images" / "train" / "class_0" / "0002.png"  # row 1, inside shard 0
    content, count = file.read_bytes(), build_module.count_shards

    def count_after_another_machine_came(out, manifest):
        monkeypatch.undo()
        noise_image(99, 16, 16).save(file)
        machine(0)
        file.write_bytes(content)
        return count(out, manifest)

    monkeypatch.setattr(build_module, "count_shards", count_after_another_machine_came)
    with pytest.raises(InputError, match="holds maps of other data: row 1 is not"):
        machine(2)


def test_own_shards_that_a_slower_call_of_other_images_replaced_are_held_against_the_images(tiny_images, tmp_path):
    """Both calls build everything; the other's shard 1 takes its place once this one has built all of its own."""
    tiny_images("folder", n=12)
    file = tmp_path / "images" / "train" / "class_0" / "0010.png"  # row 5, inside shard 1

    def opened():
        return load_labeled_images(str(tmp_path / "images"), "train")

    build(opened(), tmp_path / "slower", shard_size=4)
    noise_image(99, 16, 16).save(file)
    late = sorted((tmp_path / "slower" / "data").glob("*.parquet"))[1]
    real = build_module.count_shards

    def count(out, manifest):
        shutil.copy(late, out / "data")
        return real(out, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "count_shards", count)
        with pytest.raises(InputError, match="holds maps of other data: row 5 is not"):
            build(opened(), tmp_path / "maps", shard_size=4)
    assert not (tmp_path / "maps" / "provenance.json").exists()


@pytest.fixture
def reads(monkeypatch):
    """The rows whose images are read to hold shards against them."""
    rows, real = [], shard_builder.read_item
    monkeypatch.setattr(shard_builder, "read_item", lambda data, index: rows.append(index) or real(data, index))
    return rows


def test_shards_that_are_known_to_be_of_the_images_are_read_at_their_ends_alone(tiny_images, tmp_path, reads):
    images = load_labeled_images(str(tiny_images(n=12)), "train")
    assert build(images, tmp_path / "maps", shard=(0, 3), shard_size=4) is None
    assert build(images, tmp_path / "maps", shard=(1, 3), shard_size=4) is None
    assert reads == []
    assert build(images, tmp_path / "maps", shard_size=4) is not None
    assert reads == [0, 3, 4, 7]
    reads.clear()
    assert build(images, tmp_path / "maps", shard_size=4) is not None  # finished
    assert reads == [0, 3, 4, 7, 8, 11]
    reads.clear()
    (tmp_path / "maps" / "provenance.json").unlink()
    assert build(images, tmp_path / "maps", shard_size=4) is not None  # nothing says any more of which they are
    assert reads == list(range(12))


def test_finished_store_says_of_which_images_it_is_in_its_manifest_alone(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images(n=12)), "train")
    assert build(images, tmp_path / "maps", shard=(0, 3), shard_size=4) is None
    assert (tmp_path / "maps" / ".images").is_dir()
    assert build(images, tmp_path / "maps", shard_size=4) is not None
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        *("README.md", "data", "manifest.json", "provenance.json"),
    ]


def test_what_somebody_put_beside_the_statements_of_a_build_stays(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images(n=12)), "train")
    build(images, tmp_path / "maps", shard=(0, 3), shard_size=4)
    mine = tmp_path / "maps" / ".images" / "cat.png"
    mine.write_bytes(b"mine")
    build(images, tmp_path / "maps", shard_size=4)
    assert [path.name for path in mine.parent.iterdir()] == ["cat.png"]


def test_refused_build_leaves_the_shards_of_a_finished_store(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images("folder", n=12)), "train")
    build(images, tmp_path / "maps", shard_size=4, logits=True)
    before = {path: path.read_bytes() for path in (tmp_path / "maps" / "data").iterdir()}
    file = tmp_path / "images" / "train" / "class_1" / "0011.png"
    content = file.read_bytes()
    noise_image(99, 16, 16).save(file)
    with pytest.raises(InputError, match="holds maps of other data"):
        build(load_labeled_images(str(tmp_path / "images"), "train"), tmp_path / "maps", shard_size=4, logits=True)
    file.write_bytes(content)
    build(images, tmp_path / "maps", shard_size=4, logits=True)
    assert {path: path.read_bytes() for path in (tmp_path / "maps" / "data").iterdir()} == before


def test_image_that_was_another_for_one_machine_alone_is_noticed_at_the_end(machine, tmp_path):
    file = tmp_path / "images" / "train" / "class_0" / "0010.png"  # row 5, inside shard 1
    content = file.read_bytes()
    assert machine(0) is None
    noise_image(99, 16, 16).save(file)
    assert machine(1) is None
    file.write_bytes(content)
    with pytest.raises(InputError, match="holds maps of other data: row 5 is not"):
        machine(2)
