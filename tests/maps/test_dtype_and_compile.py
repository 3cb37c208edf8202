"""A store in bfloat16 or of compiled gradients: by name alone, and its manifest says what that changed."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_manifest, tiny_teacher

from timm_igkd.attribution.chunk_gradient import Arithmetic
from timm_igkd.attribution.correlation import map_correlation
from timm_igkd.attribution.options import IGOptions
from timm_igkd.errors import InputError, RunError
from timm_igkd.files import read_mapping
from timm_igkd.maps import row_maker
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.manifest import Deviation, read_manifest

IMAGES = ImageList([noise_image(seed, 32, 32) for seed in range(10)], [seed % 2 for seed in range(10)])
TWO_STEPS = IGOptions(n_steps=2)
MANIFEST = tiny_manifest(2)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def build(folder, **settings):
    return compute_maps(tiny_teacher(), IMAGES, folder, **{"options": TWO_STEPS, "progress": False} | settings)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return build(tmp_path_factory.mktemp("exact") / "maps")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    return build(tmp_path_factory.mktemp("rounded") / "maps", dtype="bfloat16")


def test_default_is_eager_float32_and_nothing_is_measured(exact):
    assert exact.provenance.arithmetic == Arithmetic()
    assert exact.provenance.kernel_error is None


def test_bfloat16_makes_other_maps_and_the_manifest_has_their_measured_error(exact, rounded):
    assert read_manifest(rounded.path).dtype == "bfloat16"
    error = rounded.provenance.kernel_error
    assert error.images == 8
    assert 0.9 < error.correlation < 1
    assert 0 < error.relative < 0.3
    maps = [torch.from_numpy(np.stack([store.levels(row) for row in range(10)])) for store in (exact, rounded)]
    apart = map_correlation(*maps).tolist()
    assert error.correlation - 0.01 < min(apart) < 1


def test_measured_error_is_written_before_the_first_shard(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise RuntimeError("stopped")

    monkeypatch.setattr("timm_igkd.maps.build.ShardBuilder.build", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        build(tmp_path / "maps", dtype="bfloat16")
    assert read_mapping(tmp_path / "maps" / "manifest.json")["kernel_error"]["images"] == 8


def test_fewer_images_than_are_measured_are_all_measured(tmp_path):
    assert build(tmp_path / "maps", dtype="bfloat16", limit=3).provenance.kernel_error.images == 3


def test_maps_in_bfloat16_computed_again_are_the_stored_ones(rounded):
    worst, correlation, *_ = recompute_rows(rounded, tiny_teacher(), IMAGES, 5)
    assert (worst, correlation) == (0, 1.0) or (worst <= 1 and correlation > 0.9999)


@pytest.mark.parametrize(("settings", "name"), [({"dtype": "bfloat16"}, "dtype"), ({"compile": True}, "compiled")])
def test_store_of_one_kernel_is_not_continued_with_another(exact, settings, name, tmp_path):
    folder = shutil.copytree(exact.path, tmp_path / "maps")
    with pytest.raises(InputError, match=f"made with other settings: {name} is "):
        build(folder, **settings)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"compile": True}])
def test_captum_takes_neither(settings, tmp_path):
    with pytest.raises(InputError, match="engine 'captum' computes in eager float32; leave dtype and compile out"):
        build(tmp_path / "maps", engine="captum", **settings)
    assert not (tmp_path / "maps").exists()


def test_maps_that_are_not_finite_in_the_dtype_are_refused_before_the_store(tmp_path, monkeypatch):
    real = row_maker.RowMaker.maps

    def maps(self, *args):
        found = real(self, *args)
        return found if self.manifest.dtype == "float32" else found * torch.nan

    monkeypatch.setattr(row_maker.RowMaker, "maps", maps)
    with pytest.raises(RunError, match="maps in bfloat16 are not finite; leave --dtype"):
        build(tmp_path / "maps", dtype="bfloat16")
    assert not (tmp_path / "maps").exists()


def test_error_is_that_of_the_worst_map(monkeypatch):
    wanted = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])
    found = wanted + torch.tensor([[[0.0, 0.5]], [[0.0, 0.2]]])

    class Given:
        def __init__(self, teacher, dataset, manifest, device):
            self.values = wanted if manifest.arithmetic == Arithmetic() else found

        def read(self, index):
            return None

        def maps(self, indices, items):
            return self.values

    monkeypatch.setattr(row_maker, "RowMaker", Given)
    manifest = dataclasses.replace(MANIFEST, dtype="bfloat16")
    error = row_maker.measure_deviation(None, IMAGES, manifest, torch.device("cpu"), [0, 1])
    assert error == Deviation(images=2, relative=pytest.approx(0.2), correlation=pytest.approx(1))


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [([1, 2], [2, 4], 1), ([1, 2], [2, 1], -1), ([0, 0], [0, 0], 1), ([0, 0], [1, 1], 0), ([0, 0], [1, 2], 0)],
)
def test_correlation_of_maps_is_defined_for_constant_ones(first, second, wanted):
    assert float(map_correlation(torch.tensor([[first]]), torch.tensor([[second]]))) == pytest.approx(wanted)


@pytest.mark.slow
@needs_compiler
def test_compiled_maps_are_the_eager_ones_to_rounding(exact, tmp_path):
    store = build(tmp_path / "maps", compile=True)
    assert store.provenance.compiled
    assert store.provenance.kernel_error.relative < 1e-4
    assert max(np.abs(store.levels(row).astype(int) - exact.levels(row)).max() for row in range(10)) <= 1


@pytest.mark.slow
def test_missing_compiler_is_named_in_one_line(tmp_path):
    from torch._inductor import config  # here, as it takes seconds

    # torch's own patch: monkeypatch deletes what is not in the __dict__, and torch then hides the setting for good
    torch.compiler.reset()
    without_compiler = config.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)})
    named = pytest.raises(RunError, match=r"--compile failed \(.*\); leave it out, or install a compiler")
    with without_compiler, named as caught:
        build(tmp_path / "maps", compile=True)
    assert config.force_disable_caches is False
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "maps").exists()


def test_dtype_and_compile_are_flags(command, tiny_images, teacher_folder, tmp_path):
    flags = ["--teacher", f"local-dir:{teacher_folder}", "--dataset", tiny_images(), "--split", "train"]
    built = command("maps", *flags, "--n-steps", 2, "--out", tmp_path / "maps", "--dtype", "bfloat16")
    assert (built.code, built.error) == (0, "")
    assert "least correlation with eager float32 0.9" in built.output
    assert read_manifest(tmp_path / "maps").arithmetic == Arithmetic("bfloat16")
    refused = command("maps", *flags, "--out", tmp_path / "other", "--dtype", "float16")
    assert refused.code == 2
    assert "float16" in refused.error
