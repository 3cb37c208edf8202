from pathlib import Path

import pytest
import timm
import torch

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.models.loading import count_macs, count_parameters, load_model, save_model
from timm_igkd.models.mobilenetv2_cifar import MobileNetV2Cifar

PAPER_COUNTS = {
    0: (2_236_682, 1.0),
    3: (1_019_402, 1.28),
    5: (543_498, 1.50),
    7: (306_954, 2.01),
    9: (185_738, 2.42),
    11: (77_194, 2.97),
    13: (40_970, 3.73),
    15: (16_042, 5.89),
    17: (1_994, 51.6),
}


@pytest.fixture
def model() -> MobileNetV2Cifar:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv2_cifar", drop_blocks=13).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("drop_blocks", PAPER_COUNTS)
def test_parameter_count_is_the_papers(drop_blocks):
    model = timm.create_model("mobilenetv2_cifar", drop_blocks=drop_blocks)
    assert count_parameters(model) == PAPER_COUNTS[drop_blocks][0]


def test_whole_network_has_the_papers_macs():
    assert round(count_macs(timm.create_model("mobilenetv2_cifar")) / 1e6, 1) == 88.0


@pytest.mark.parametrize("drop_blocks", PAPER_COUNTS)
def test_macs_ratio_is_the_papers(drop_blocks):
    whole = count_macs(timm.create_model("mobilenetv2_cifar"))
    cut = count_macs(timm.create_model("mobilenetv2_cifar", drop_blocks=drop_blocks))
    assert float(f"{whole / cut:.3g}") == PAPER_COUNTS[drop_blocks][1]


@pytest.mark.parametrize("drop_blocks", [-1, 18, 2.0, "5", True])
def test_drop_blocks_out_of_range_names_the_range(drop_blocks):
    with pytest.raises(InputError, match="from 0 to 17"):
        timm.create_model("mobilenetv2_cifar", drop_blocks=drop_blocks)


def test_forward_is_head_of_features(model, images):
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)), rtol=0, atol=0)


def test_intermediates_agree_with_feature_info(model, images):
    final, intermediates = model.forward_intermediates(images)
    assert [f.shape[1] for f in intermediates] == [info["num_chs"] for info in model.feature_info]
    assert [32 // f.shape[2] for f in intermediates] == [info["reduction"] for info in model.feature_info]
    assert torch.equal(final, model.forward_features(images))


def test_stop_early_returns_the_same_intermediate(model, images):
    whole = model.forward_intermediates(images, intermediates_only=True)
    early = model.forward_intermediates(images, indices=[2], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], whole[2])


def test_pruned_model_gives_the_intermediate(model, images):
    expected = model.forward_intermediates(images, intermediates_only=True)[3]
    model.prune_intermediate_layers([3])
    assert torch.equal(model(images), expected)
    assert model.num_features == expected.shape[1]


def test_features_only_gives_one_map_per_reduction(images):
    backbone = timm.create_model("mobilenetv2_cifar", features_only=True).eval()
    assert [f.shape[2] for f in backbone(images)] == [32, 16, 8, 4]


def test_reset_classifier_changes_classes_and_pooling(model, images):
    model.reset_classifier(7, "catavgmax")
    assert model(images).shape == (2, 7)
    assert model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_gradient_checkpointing_keeps_the_gradients(model, images):
    model(images).sum().backward()
    expected = model.features[0][0].weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    torch.testing.assert_close(model.features[0][0].weight.grad, expected)


def test_parameter_groups_go_from_stem_to_head(model):
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert groups[0][0].startswith("features.0.")
    assert groups[len(groups) - 1] == ["classifier.1.weight", "classifier.1.bias"]


def test_preprocessing_is_unnormalised_32x32(model):
    config = timm.data.resolve_data_config(model=model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 32, 32), (0.0,) * 3, (1.0,) * 3)


def test_in_chans_and_classes_are_arguments():
    model = timm.create_model("mobilenetv2_cifar", drop_blocks=17, in_chans=1, num_classes=4)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["kd_92.29", "kd_ig_at_92.42"])
def test_released_student_scores_its_number(name, shared):
    file = shared / f"weights/paper_students/{name}.safetensors"
    data = shared / "data/cifar10/test-00000-of-00001.parquet"
    model = load_model("mobilenetv2_cifar", model_args={"drop_blocks": 5}, checkpoint=file)
    images, labels = _first_cifar10_images(data, 250)
    with torch.no_grad():
        top1 = 100 * (model(images).argmax(1) == labels).float().mean().item()
    assert abs(top1 - float(name.rsplit("_", 1)[1])) < 3


def _first_cifar10_images(parquet: Path, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = next(pq.ParquetFile(parquet).iter_batches(batch_size=n)).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor([row["label"] for row in rows])


def test_weights_that_are_a_link_to_nowhere_are_missing(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(MissingFileError, match="has no weights"):
        load_model(f"local-dir:{tmp_path / 'model'}")


@pytest.mark.parametrize("side", [0, -1, 16_385, 10**20])
def test_input_side_that_no_image_has_is_refused(side):
    with pytest.raises(InputError, match="img_size must be"):
        load_model("test_resnet", pretrained=False, img_size=side)


@pytest.mark.parametrize("name", ["pit_ti_224", "cait_xxs24_224"])
def test_macs_of_models_that_make_a_view_of_a_parameter_are_counted(name):
    model = timm.create_model(name).train()
    first = next(model.parameters()).requires_grad_(False)
    expected = count_macs(timm.create_model(name).requires_grad_(False))
    assert count_macs(model) == expected > 1e8
    assert [p is first for p in model.parameters() if not p.requires_grad] == [True]
    assert model.training


@pytest.mark.parametrize("side", [50, 100])
def test_a_size_that_an_architecture_cannot_read_is_one_line_whatever_it_raises(side):
    with pytest.raises(InputError, match=rf"'mvitv2_tiny' cannot read images of {side} x {side} pixels \(.*choose"):
        load_model("mvitv2_tiny", pretrained=False, img_size=side)
