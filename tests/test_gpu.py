"""What only a CUDA device shows; run by `pytest -m gpu`. The same checks pass with DEVICE set to the CPU."""

import numpy as np
import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd import IGOverlay, MapStore, compute_maps
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import IGOptions, reduce_channels
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.training.device_batches import DeviceBatches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_maps_of_the_gpu_are_those_of_the_cpu(name):
    options, generator = IGOptions(n_steps=16), torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 2
    maps = []
    for device in (torch.device("cpu"), DEVICE):
        engine = FastEngine(tiny_teacher(name, size=32), options, 32, (3, 32, 32), device)
        there = inputs.to(device)
        values = engine.attribute(there, torch.zeros_like(there[:1]), targets.to(device), engine.forward(there)).values
        maps.append(reduce_channels(values, "abs_sum").cpu().flatten(1))
    errors = (maps[0] - maps[1]).abs().amax(1) / maps[0].amax(1)
    assert errors.median() <= 1e-3
    assert errors.max() <= 5e-3


@pytest.mark.parametrize("n_steps", [8, "auto"])
@pytest.mark.parametrize(("dtype", "compile"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_store_says_what_its_kernel_changed(n_steps, dtype, compile, tmp_path):
    dataset = ImageList([noise_image(index, 32, 32) for index in range(20)], [index % 2 for index in range(20)])
    options = IGOptions(n_steps=n_steps)
    kernel = {"dtype": dtype, "compile": compile}
    store = compute_maps(tiny_teacher(size=32), dataset, tmp_path / "maps", options=options, logits=True, **kernel)
    assert len(store) == 20
    MapStore(tmp_path / "maps").verify(dataset)
    if kernel == {"dtype": "float32", "compile": False}:
        assert store.provenance.kernel_error is None
    else:
        assert store.provenance.kernel_error.correlation > (0.9 if dtype == "bfloat16" else 0.999)


def test_batches_made_on_the_gpu_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    maps = torch.randint(0, 256, (24, 1, 32, 32), dtype=torch.uint8, generator=generator)
    data = DeviceImages(images, torch.arange(24) % 2, maps, torch.randn(24, 2, generator=generator))
    augmentation = DeviceAugmentation(IGOverlay(0.5), padding=4, hflip=0.5, cutout=8, teacher_view="clean")
    expected, found = (
        list(DeviceBatches(data.to(device), augmentation, 8, seed=0).epoch(1)) for device in ("cpu", DEVICE)
    )
    for here, there in zip(expected, found, strict=True):
        assert torch.equal(here.labels, there.labels.cpu())
        for view in ("student", "teacher", "logits"):
            difference = (getattr(here, view) - getattr(there, view).cpu()).abs()
            assert difference.max() <= 1.01 / 255  # a blend may round the other way
            assert np.mean((difference > 1e-5).numpy()) < 1e-3


def test_accuracy_is_computed_on_the_gpu_and_latency_on_the_cpu():
    dataset = ImageList([noise_image(index, 32, 32) for index in range(8)], [index % 2 for index in range(8)])
    model = tiny_teacher(size=32)
    expected, found = (evaluate(model, dataset, device=device, latency_device="cpu") for device in ("cpu", DEVICE))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-2, atol=1e-2)  # convolutions in TF32
    assert found.metrics["device"] == "cpu"
    assert next(model.parameters()).device.type == "cpu"
