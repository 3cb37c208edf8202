"""Families of timm's models, as teacher and as student: maps, one training step, save, reload."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_loader
from tiny_parts import ImageList, noise_image
from torch import nn

from timm_igkd import IGDistillationTask, IGOptions, IGOverlay, IGOverlayDataset, compute_maps, save_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # timm's and torch's own, model by model

FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {  # a small model, its input size, its arguments
    "ResNet": ("resnet10t", 32, {}),
    "ConvNeXt": ("convnext_atto", 32, {}),
    "ViT": ("vit_tiny_patch16_224", 32, {"img_size": 32}),
    "DeiT": ("deit_tiny_patch16_224", 32, {"img_size": 32}),
    "Swin": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "window_size": 2}),
    "EfficientNet": ("efficientnet_lite0", 32, {}),
    "MobileNetV3": ("mobilenetv3_small_050", 32, {}),
    "RegNet": ("regnetx_002", 32, {}),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    "DenseNet": ("densenet121", 32, {}),
    "VGG": ("vgg11", 32, {"mlp_ratio": 0.02}),
    "MLP-Mixer": ("mixer_s32_224", 64, {"img_size": 64}),
}


def create(family: str, seed: int) -> nn.Module:
    name, size, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model(name, num_classes=2, pretrained_cfg_overlay=overlay, **arguments)
    nn.init.normal_(model.get_classifier().weight, std=0.1)  # some begin at 0, without a gradient
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_and_student_of(family: str, tmp_path: Path):
    size = FAMILIES[family][1]
    teacher, student = create(family, 0).eval(), create(family, 1)
    images = ImageList([noise_image(seed, size, size) for seed in range(2)], [0, 1])

    store = compute_maps(teacher, images, tmp_path / "maps", options=IGOptions(n_steps=2), progress=False)
    assert store is not None
    assert len(store) == 2
    assert all(store.levels(row).std() > 0 for row in range(2))

    dataset = IGOverlayDataset(images, store, IGOverlay(overlay_prob=1), teacher_view="clean", seed=0)
    loader = create_loader(dataset, (3, size, size), 2, is_training=True, num_workers=0, device=torch.device("cpu"))
    views = {"teacher_view": "clean", "view_layout": "flat"}
    task = IGDistillationTask(
        student, teacher, distill_loss_weight=0.5, attention_loss_weight=0.8, verbose=False, **views
    )
    before = copy.deepcopy(student.state_dict())
    frozen = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    result = task.train()(*next(iter(loader)))
    result["loss"].backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)  # batch norms over two images of one pixel have steep gradients
    optimizer.step()
    assert all(result[name].isfinite() for name in ("loss", "task_loss", "distill_loss", "attention_loss"))
    assert any(not torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(torch.equal(frozen[name], tensor) for name, tensor in teacher.state_dict().items())

    save_model(student.eval(), tmp_path / "student")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    inputs = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = student(inputs)
        assert expected.isfinite().all()
        assert torch.equal(reloaded(inputs), expected)
