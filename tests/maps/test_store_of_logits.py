"""Stores of logits alone (method "none"): nothing is attributed, rows are guarded, and nobody takes them for maps."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from command_lines import Runner, two_splits
from hub_parts import code_blocks
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store

from timm_igkd import IGOverlay, IGOverlayDataset, MapStore, load_labeled_images, load_model, score_maps
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import TeacherView
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import UNLABELED
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.card import dataset_card
from timm_igkd.overlay.device_images import StoredMaps, load_images
from timm_igkd.overlay.preview import overlay_samples

IMAGES = ImageList([noise_image(seed) for seed in range(5)], [0, 1, 0, 1, 0])
LOGITS = IGOptions(method="none")


def build(folder, images=IMAGES, **more: object) -> MapStore:
    return compute_maps(tiny_teacher(), images, folder, options=LOGITS, logits=True, progress=False, **more)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> MapStore:
    return build(tmp_path_factory.mktemp("logits") / "store", shard_size=2)


def test_rows_hold_what_the_teacher_answers(store):
    teacher = tiny_teacher().eval()
    view = TeacherView(teacher)
    with torch.inference_mode():
        wanted = teacher(torch.stack([view(image) for image, _ in (IMAGES[row] for row in range(5))]))
    found = torch.stack([torch.from_numpy(store.logits(row)) for row in range(5)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_cost_no_gradient_and_say_so(store):
    rows = store.rows
    assert (rows["n_steps"][:], rows["converged"][:], rows["scale"][:]) == ([0] * 5, [True] * 5, [0.0] * 5)
    assert store.provenance.statistics.mean_steps == 0
    assert store.provenance.options.used == {"method": "none"}


def test_no_gradient_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(FastEngine, "gradients", lambda *args: pytest.fail("a gradient was taken"))
    build(tmp_path / "store")


def test_logits_are_those_beside_maps(store, tmp_path):
    steps = IGOptions(n_steps=1)
    settings = {"options": steps, "logits": True, "shard_size": 2, "progress": False}
    maps = compute_maps(tiny_teacher(), IMAGES, tmp_path / "maps", **settings)
    for row in range(5):
        assert torch.equal(torch.from_numpy(store.logits(row)), torch.from_numpy(maps.logits(row)))


def test_store_is_verified_computed_again_and_resumed_to_the_same_bytes(store, tmp_path):
    store.verify(IMAGES)
    assert recompute_rows(store, tiny_teacher(), IMAGES, 5) == (0, 1.0, pytest.approx(0, abs=1e-6), 0.0, 0.0)
    again = build(tmp_path / "store", shard_size=2).path
    next(iter(sorted((again / "data").iterdir()))).unlink()
    (again / "provenance.json").unlink()
    build(again, shard_size=2)
    for path in (store.path / "data").iterdir():
        assert (again / "data" / path.name).read_bytes() == path.read_bytes()


def test_labels_decide_nothing(tmp_path):
    unlabelled = ImageList([noise_image(seed) for seed in range(5)], [UNLABELED, 7, 0, 1, 0])
    store = build(tmp_path / "store", unlabelled)
    assert store.find(noise_image(1), 2, None, "it") == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.levels(0),
        lambda store: store.overlay_map(0),
        lambda store: store.float_map(0),
        lambda store: IGOverlayDataset(IMAGES, store),
        lambda store: IGOverlayDataset(IMAGES, store, overlay_source="blank"),
        lambda store: IGOverlayDataset(IMAGES, store, IGOverlay(0.0), with_maps=True),
        lambda store: StoredMaps(store, IMAGES, load_images(IMAGES)).maps("sobel", 0),
        lambda store: overlay_samples(store, IMAGES, 2),
        lambda store: score_maps(store, tiny_teacher(), IMAGES, steps=2, progress=False),
    ],
)
def test_where_maps_are_wanted_the_remedy_is_told(use, store):
    with pytest.raises(InputError, match="holds logits alone; build maps into another folder"):
        use(store)


def test_overlay_in_a_randaugment_string_is_refused(store):
    from timm.data import create_transform

    dataset = IGOverlayDataset(IMAGES, store, IGOverlay(0.0))
    with pytest.raises(InputError, match="holds logits alone"):
        dataset.transform = create_transform(16, is_training=True, auto_augment="rand-m9-n2-p0.5-tigkd")


def test_items_end_with_the_logits(store):
    dataset = IGOverlayDataset(IMAGES, store, IGOverlay(0.0), with_logits=True)
    assert torch.equal(dataset[3][-1], torch.from_numpy(store.logits(3)))
    stored = StoredMaps(store, IMAGES, load_images(IMAGES)).logits()
    assert torch.equal(stored[3], torch.from_numpy(store.logits(3)))


def swapped(names: tuple[str, ...] | None = None, labels: Sequence[int] = (1, 0, 1, 0, 1)) -> ImageList:
    """Return the images under other labels, as of a data set that lists the two classes in another order."""
    images = ImageList(IMAGES.images, labels, name="swapped")
    if names is not None:
        images.classes = names
    return images


def logits_on_both_roads(images: ImageList, store: MapStore) -> list[torch.Tensor]:
    dataset = IGOverlayDataset(images, store, IGOverlay(0.0), with_logits=True)
    stored = StoredMaps(store, images, load_images(images))
    one_by_one = torch.stack([dataset[index][-1] for index in range(len(images))])
    assert torch.equal(one_by_one, stored.logits())
    return list(one_by_one)


@pytest.mark.parametrize("names", [None, ("cat", "dog")])
def test_logits_of_another_label_are_refused_where_no_class_names_decide(names, store):
    """A data set in another order of its classes got the logits in the wrong columns, without a word."""
    images = swapped(names)
    told = r"image 0 of 'swapped' has label 1, but its logits were stored for label 0.*maps --method none"
    with pytest.raises(InputError, match=told):
        IGOverlayDataset(images, store, IGOverlay(0.0), with_logits=True)[0]
    with pytest.raises(InputError, match=told):
        StoredMaps(store, images, load_images(images)).logits()
    assert IGOverlayDataset(images, store, IGOverlay(0.0))[0][1] == 1  # where no logits are asked for


def test_logits_of_maps_of_the_predicted_class_are_refused_likewise(tmp_path):
    logits = [np.array([5.0, -5.0], np.float32)] * 5
    store = write_store(tmp_path, IMAGES, [ramp(0, 16, 16)] * 5, target="predicted", logits=logits)
    assert len(logits_on_both_roads(IMAGES, store)) == 5
    with pytest.raises(InputError, match="image 0 of 'swapped' has label 1, but its logits were stored for label 0"):
        IGOverlayDataset(swapped(), store, with_logits=True)[0]
    IGOverlayDataset(swapped(), store, IGOverlay(1.0))[0]  # its map is of no label


def test_logits_of_another_label_are_taken_where_both_sides_name_the_classes(tmp_path):
    """Corrected labels: the columns are the classes' whatever an image is labelled."""
    named = swapped(("a", "b"), IMAGES.labels)
    store = build(tmp_path / "store", named)
    found = logits_on_both_roads(swapped(("a", "b")), store)
    assert torch.equal(found[0], torch.from_numpy(store.logits(0)))
    with pytest.raises(InputError, match="class 'b' is label 0 of 'swapped' and number 1 in the logits"):
        IGOverlayDataset(swapped(("b", "a")), store, IGOverlay(0.0), with_logits=True)
    with pytest.raises(InputError, match="has label 1, but its logits were stored for label 0"):
        logits_on_both_roads(swapped(("one", "two")), store)  # no name in common


def test_logits_of_images_without_a_label_on_either_side_are_taken(store, tmp_path):
    assert len(logits_on_both_roads(swapped(labels=[UNLABELED] * 5), store)) == 5
    unlabelled = build(tmp_path / "store", swapped(labels=[UNLABELED] * 5))
    assert len(logits_on_both_roads(IMAGES, unlabelled)) == 5


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"n_steps": 2}, {}, "n_steps is of maps, method 'none' makes none; leave it out"),
        ({"target": "predicted"}, {}, "target is of maps, method 'none' makes none"),
        ({"reduction": "sum"}, {}, "reduction is of maps, method 'none' makes none"),
        ({}, {"map_size": 4}, "map_size is of maps, method 'none' makes none"),
        ({}, {"logits": False}, "logits are all there is to keep; set logits to true"),
        ({}, {"engine": "captum"}, "engine 'captum' is the reference of method 'ig' alone"),
        ({}, {"dtype": "bfloat16"}, "logits are computed in eager float32"),
    ],
)
def test_what_only_maps_have_is_refused(options, settings, message, tmp_path):
    wanted = {"logits": True, "progress": False, **settings}

    def built() -> None:
        compute_maps(tiny_teacher(), IMAGES, tmp_path / "s", options=IGOptions(method="none", **options), **wanted)

    with pytest.raises(InputError, match=message):
        built()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("repo_id", [None, "user/logits"])
def test_card_tells_of_no_map(repo_id, store):
    card = dataset_card(store.provenance, repo_id)
    assert "# Logits of" in card
    assert "pretty_name: Logits of" in card
    assert "maps.logits(0)" in card
    assert ('row["logits"]' in card) == (repo_id is not None)
    for absent in ("attribution", "maps.png", "| Steps |", "| Target", "| Constant maps |", "float_map", 'row["map"]'):
        assert absent not in card


@pytest.mark.parametrize("options", [LOGITS, IGOptions(n_steps=1)], ids=["logits", "maps"])
@pytest.mark.parametrize("repo_id", [None, "user/maps"])
def test_code_on_a_card_can_be_copied(options, repo_id, tmp_path):
    store = compute_maps(tiny_teacher(), IMAGES, tmp_path / "s", options=options, logits=True, progress=False)
    blocks = code_blocks(dataset_card(store.provenance, repo_id))
    assert len(blocks) == (1 if repo_id is None else 2)
    for block in blocks:
        compile(block, "card", "exec")


def test_images_without_a_row_get_the_fitting_remedy(store):
    with pytest.raises(
        InputError, match=r"it has no row: .*build logits of this data with: timm-igkd maps --method none"
    ):
        store.find(noise_image(99), 0, None, "it")
    partly = build_prefix(store)
    with pytest.raises(InputError, match=r"rebuild it without --limit: timm-igkd maps --method none$"):
        partly.find(noise_image(4), 0, None, "it")


def build_prefix(store: MapStore) -> MapStore:
    return build(store.path.parent / "prefix", limit=2)


def test_script_of_timm_is_not_begun_with_logits_alone(command: Runner, store, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('begun')")
    found = command("run", "--maps", store.path, "--overlay-prob", 0, "--", script)
    assert (found.code, "holds logits alone" in found.error, "begun" in found.output) == (2, True, False)


def test_command_builds_verifies_and_recomputes(command: Runner, tiny_images, teacher_folder, tmp_path):
    images, out = two_splits(tiny_images), tmp_path / "logits"
    data = ["--dataset", images, "--split", "train", "--teacher", f"local-dir:{teacher_folder}"]
    built = command("maps", *data, "--method", "none", "--out", out)
    assert built.code == 0, built.error
    assert built.output.splitlines()[-1] == f"{out}: 16 logits"
    checked = command("verify", "--maps", out, *data, "--recompute", 4)
    assert checked.code == 0, checked.error
    assert "4 rows computed again: logits within" in checked.output
    for option in (["--n-steps", 50], ["--output", "logit"], ["--target", "label"]):
        refused = command("maps", *data, "--method", "none", *option, "--out", tmp_path / "other")
        assert (refused.code, "method 'none' makes none" in refused.error) == (2, True)
    shown = command("preview", "--maps", out, *data[:4], "--out", tmp_path / "grid.png")
    assert (shown.code, "holds logits alone" in shown.error) == (2, True)


def test_logits_of_other_code_fail_recompute(command: Runner, tiny_images, teacher_folder, tmp_path, monkeypatch):
    images, out = two_splits(tiny_images), tmp_path / "maps"
    teacher = load_model(f"local-dir:{teacher_folder}")
    with monkeypatch.context() as other:
        other.setattr("timm_igkd.maps.row_maker.RowMaker._dataset_logits", lambda self, logits: logits * 1.01)
        dataset = load_labeled_images(str(images), "train")
        compute_maps(teacher, dataset, out, options=IGOptions(n_steps=1), logits=True, progress=False)
    data = ["--dataset", images, "--split", "train", "--teacher", f"local-dir:{teacher_folder}"]
    found = command("verify", "--maps", out, *data, "--recompute", 4)
    assert (found.code, "logits of 4 images computed again differ by up to 0.0099" in found.error) == (2, True)


def test_images_are_named_for_errors_alone(tiny_images, tmp_path, monkeypatch):
    """Naming one reads its row, bytes and all, which is work for each image."""
    dataset = load_labeled_images(str(tiny_images(size=32)), "train")
    named = []
    monkeypatch.setattr(LabeledImages, "row_name", lambda self, index: named.append(index))
    options = IGOptions(n_steps=2)
    store = compute_maps(
        tiny_teacher(size=32), dataset, tmp_path / "maps", options=options, logits=True, progress=False
    )
    store.verify(dataset)
    stored = StoredMaps(store, dataset, load_images(dataset))
    assert (len(stored.maps("aligned", 0)), len(stored.logits()), named) == (8, 8, [])
