"""Stores of every method: the same rows, checks and resumes; a store says which method made it."""

import json

import pyarrow.parquet as pq
import pytest
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.ig_options import IGOptions, Method
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.card import dataset_card
from timm_igkd.maps.manifest import read_manifest
from timm_igkd.maps.row_format import read_row
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import save_model

IMAGES = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])
OTHERS = ("input_x_gradient", "saliency", "grad_cam")


def build(folder, method: Method, **options: object) -> MapStore:
    teacher = tiny_teacher("test_vit", size=32)
    wanted = IGOptions(method=method, **options)
    return compute_maps(teacher, IMAGES, folder, options=wanted, shard_size=2, progress=False)


@pytest.fixture(scope="module", params=OTHERS)
def store(request, tmp_path_factory) -> MapStore:
    return build(tmp_path_factory.mktemp(request.param) / "maps", request.param)


def test_rows_have_one_gradient_no_delta_and_converge(store):
    rows = store.rows
    assert (rows["n_steps"][:], rows["convergence_delta"][:], rows["converged"][:]) == ([1] * 4, [0.0] * 4, [True] * 4)
    assert all(scale > 0 for scale in rows["scale"])


def test_store_is_verified_and_computed_again(store):
    store.verify(IMAGES)
    worst, correlation, *_ = recompute_rows(store, tiny_teacher("test_vit", size=32), IMAGES, 4)
    assert (worst, correlation) == (0, pytest.approx(1.0))


def test_row_with_steps_is_damaged(store):
    shard = next((store.path / "data").iterdir())
    cells = pq.read_table(shard).to_pylist()[0] | {"n_steps": 2}
    with pytest.raises(InputError, match="its n_steps is 2, expected 1"):
        read_row(cells, store.provenance, "it")


def test_card_names_the_method_and_no_path(store):
    card, method = dataset_card(store.provenance), store.provenance.options.method
    words = {"input_x_gradient": "Input-times-gradient", "saliency": "Saliency", "grad_cam": "Grad-CAM"}[method]
    assert f"# {words} maps of" in card
    assert "ntegrated-gradients maps" not in card
    for absent in ("| Steps |", "Absolute convergence delta", "integrated-gradients\n"):
        assert absent not in card


def test_resumed_store_has_the_same_bytes(store, tmp_path):
    method = store.provenance.options.method
    build(tmp_path / "maps", method)
    shards = sorted((tmp_path / "maps" / "data").iterdir())
    shards[1].unlink()
    (tmp_path / "maps" / "provenance.json").unlink()
    build(tmp_path / "maps", method)
    assert [path.read_bytes() for path in shards] == [
        path.read_bytes() for path in sorted((store.path / "data").iterdir())
    ]


def test_another_method_into_the_same_folder_is_refused(store):
    method = store.provenance.options.method
    other: Method = "saliency" if method != "saliency" else "input_x_gradient"
    reduction = store.provenance.options.reduction
    with pytest.raises(InputError, match=f"options.method is '{method}' there, '{other}' here"):
        build(store.path, other, reduction=reduction)


def test_methods_give_different_maps(tmp_path):
    found = {method: build(tmp_path / method, method).levels(0).tobytes() for method in OTHERS}
    assert len(set(found.values())) == 3


def test_manifest_without_a_method_is_of_integrated_gradients(tmp_path):
    build(tmp_path, "ig", n_steps=2)
    for name in ("manifest.json", "provenance.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content["options"].pop("method") == "ig"
        (tmp_path / name).write_text(json.dumps(content))
    assert read_manifest(tmp_path).options == IGOptions(n_steps=2)
    assert len(build(tmp_path, "ig", n_steps=2)) == 4


def test_teacher_without_a_map_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="a map of a single pixel"):
        compute_maps(tiny_teacher(size=32), IMAGES, tmp_path / "maps", options=IGOptions(method="grad_cam"))
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "captum"}, "engine 'captum' is the reference of method 'ig' alone"),
        ({"dtype": "bfloat16"}, "grad_cam is computed in eager float32"),
        ({"compile": True}, "grad_cam is computed in eager float32"),
    ],
)
def test_grad_cam_by_another_engine_is_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        compute_maps(tiny_teacher(), IMAGES, tmp_path, options=IGOptions(method="grad_cam"), **settings)


@pytest.mark.parametrize("flags", [["--n-steps", 5], ["--n-steps", 50], ["--baseline", "mean"], ["--max-steps", 64]])
def test_flags_of_a_path_are_refused_for_a_method_without_one(flags, command, tiny_images, teacher_folder, tmp_path):
    data = ["--dataset", tiny_images(n=2), "--split", "train", "--teacher", f"local-dir:{teacher_folder}"]
    outcome = command("maps", *data, "--out", tmp_path / "maps", "--method", "saliency", *flags)
    assert outcome.code == 2
    assert "is of the path of method 'ig', 'saliency' has none; leave it out" in outcome.error
    assert not (tmp_path / "maps").exists()


def test_command_builds_and_verifies_grad_cam(command, tiny_images, tmp_path):
    save_model(tiny_teacher("test_vit", size=32), tmp_path / "vit")
    data = ["--dataset", tiny_images(n=3), "--split", "train"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'vit'}"]
    built = command("maps", *data, *teacher, "--out", tmp_path / "maps", "--method", "grad_cam")
    assert (built.code, "3 Grad-CAM maps" in built.output, "steps" in built.output) == (0, True, False)
    assert command("verify", "--maps", tmp_path / "maps", *data, "--recompute", 2).code == 0
