"""The networks for 32x32 images: exact sizes, timm's contract, weights of other implementations."""

import pytest
import timm
import torch

from timm_igkd.errors import InputError
from timm_igkd.models.convnet_cifar import whitening_filters
from timm_igkd.models.loading import count_parameters, load_model, save_model
from timm_igkd.models.resnet_cifar import checkpoint_filter_fn
from timm_igkd.models.truncation import truncate

# parameters for 10 and 100 classes, counted on mdistiller's models
COUNTS = {
    "resnet20_cifar": (272_474, 278_324),
    "resnet32_cifar": (466_906, 472_756),
    "resnet44_cifar": (661_338, 667_188),
    "resnet56_cifar": (855_770, 861_620),
    "resnet110_cifar": (1_730_714, 1_736_564),
    "resnet8x4_cifar": (1_210_410, 1_233_540),
    "resnet32x4_cifar": (7_410_730, 7_433_860),
    "wrn_16_1_cifar": (175_066, 180_916),
    "wrn_16_2_cifar": (691_674, 703_284),
    "wrn_40_1_cifar": (563_930, 569_780),
    "wrn_40_2_cifar": (2_243_546, 2_255_156),
}
SMALL = ("convnet_cifar", "resnet8x4_cifar", "resnet20_cifar", "wrn_16_1_cifar", "mobilenetv2_cifar")
EACH = pytest.mark.parametrize("name", SMALL)


def create(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


def images(n=2):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_literature(name):
    found = tuple(count_parameters(timm.create_model(name, num_classes=classes)) for classes in (10, 100))
    assert found == COUNTS[name]


def test_shortcuts_without_parameters_give_akamasters_counts():
    assert count_parameters(create("resnet20_cifar", shortcut="padding")) == 269_722
    assert count_parameters(create("resnet56_cifar", shortcut="padding")) == 853_018


def test_convnet_has_the_size_of_airbench94():
    """airbench94 counts 1,972,792 with its frozen scales of batch norm; ours adds the ten biases of the classifier."""
    assert count_parameters(create("convnet_cifar")) == 1_972_792 + 10


@EACH
@pytest.mark.parametrize("name_of_argument", ["unknown", "has_norm", "blocks", "channels", "reductions"])
def test_an_argument_that_is_no_networks_own_is_refused(name, name_of_argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument|keyword arguments?: '{name_of_argument}'"):
        timm.create_model(name, **{name_of_argument: 1})


@EACH
def test_forward_is_head_of_features(name):
    model = create(name)
    torch.testing.assert_close(model(images()), model.forward_head(model.forward_features(images())), rtol=0, atol=0)


@EACH
def test_intermediates_agree_with_feature_info(name):
    model = create(name)
    final, intermediates = model.forward_intermediates(images())
    assert [f.shape[1] for f in intermediates] == [info["num_chs"] for info in model.feature_info]
    whole = 31 if name == "convnet_cifar" else 32  # a 2x2 stem without padding
    sides = [whole // info["reduction"] for info in model.feature_info]
    assert [f.shape[2] for f in intermediates] == sides
    assert torch.equal(final, model.forward_features(images()))


@EACH
def test_features_only_gives_every_stage(name):
    features = timm.create_model(name, features_only=True)
    assert [f.shape[1] for f in features(images())] == features.feature_info.channels()


FEATURES = {
    "resnet20_cifar": {0: (0, 3, 6, 9), 1: (0, 3, 6, 8), 3: (0, 3, 6), 4: (0, 3, 5), 8: (0, 1)},
    "wrn_16_1_cifar": {0: (0, 2, 4, 6), 1: (0, 2, 4, 5), 2: (0, 2, 4)},
    "resnet8x4_cifar": {0: (0, 1, 2, 3), 1: (0, 1, 2)},
    "convnet_cifar": {0: (0, 2, 4, 6), 1: (0, 2, 4, 5), 2: (0, 2, 4), 5: (0, 1)},
    "mobilenetv2_cifar": {0: (3, 6, 13, 18), 1: (3, 6, 13, 17), 4: (3, 6, 13, 14), 5: (3, 6, 13), 14: (3, 4), 17: (1,)},
}
CUTS = [(name, drop) for name, cuts in FEATURES.items() for drop in cuts]


@pytest.mark.parametrize(("name", "drop"), CUTS)
def test_features_of_a_truncated_network_end_with_its_last_block(name, drop):
    features = timm.create_model(name, drop_blocks=drop, features_only=True)
    whole = timm.create_model(name, drop_blocks=drop)
    assert tuple(features.feature_info.out_indices) == FEATURES[name][drop]
    assert set(features.feature_info.reduction()) == {info["reduction"] for info in whole.feature_info}
    assert [f.shape[1] for f in features(images())] == features.feature_info.channels()


@EACH
def test_truncated_student_keeps_weights_and_comes_back(name, tmp_path):
    model = create(name)
    student = truncate(model, 2, num_classes=4).eval()
    assert student.pretrained_cfg["architecture"] == name
    kept = len(model.features) - 2
    expected = model.forward_intermediates(images(), indices=[kept - 1], intermediates_only=True, stop_early=True)[0]
    found = student.forward_intermediates(images(), indices=[kept - 1], intermediates_only=True, stop_early=True)[0]
    assert torch.equal(found, expected)
    save_model(student, tmp_path / "student")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), student(images()))


@pytest.mark.parametrize(("name", "highest"), [("convnet_cifar", 5), ("resnet20_cifar", 8), ("wrn_16_1_cifar", 5)])
def test_drop_blocks_leaves_the_stem_and_a_block(name, highest):
    assert create(name, drop_blocks=highest)(images()).shape == (2, 10)
    with pytest.raises(InputError, match=f"from 0 to {highest}"):
        timm.create_model(name, drop_blocks=highest + 1)


def test_widths_of_the_convnet_are_its_groups():
    model = create("convnet_cifar", widths=(8, 16, 24, 32))
    assert [info["num_chs"] for info in model.feature_info] == [24, 8, 8, 16, 16, 24, 24, 32, 32]
    for wrong in ((), (8, 0), (8, 1.5), "64", 8):
        with pytest.raises(InputError, match="widths must be the channels of each group"):
            timm.create_model("convnet_cifar", widths=wrong)


@EACH
def test_other_channels_and_no_classifier(name):
    assert create(name, in_chans=1, num_classes=0)(torch.rand(2, 1, 32, 32)).ndim == 2
    assert create(name, num_classes=0, global_pool="")(images()).ndim == 4


def test_whitening_makes_outputs_uncorrelated_for_its_own_statistics():
    """For patches whose covariance is that of the table, in the table's basis, outputs are uncorrelated, variance 1."""
    filters = whitening_filters().flatten(1).double()
    basis = filters / filters.norm(dim=1, keepdim=True)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12).double(), atol=1e-6, rtol=0)
    variances = 1 / filters.norm(dim=1).square() - 5e-4
    assert variances[0] == pytest.approx(9.97, rel=1e-3)
    assert variances.argmax() == 0


@pytest.mark.shared
def test_whitening_whitens_cifar10(shared):
    from timm_igkd import load_labeled_images
    from timm_igkd.overlay.device_images import load_images

    pixels = load_images(load_labeled_images(str(shared / "data" / "cifar10"), "test").subset(range(500))).images / 255
    model = create("convnet_cifar")
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    outputs = model.features[0][0]((pixels - mean) / std)[:, :12].transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(outputs.detach())
    assert (correlation - torch.eye(12)).abs().max() < 0.35
    assert outputs.std(1).log().abs().max() < 0.7


def test_only_the_bias_of_the_convnets_stem_is_trained():
    model = create("convnet_cifar")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["features.0.0.weight"]


def torchvision_like(model):
    """Return a ResNet's tensors under the names of chenyaofo's and mdistiller's files."""
    names = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("features.0."):
            name = name.replace("features.0.0.", "conv1.").replace("features.0.1.", "bn1.")
        elif name.startswith("features."):
            block = int(name.split(".")[1]) - 1
            stage, index = block // model.stage_blocks + 1, block % model.stage_blocks
            name = f"layer{stage}.{index}." + name.split(".", 2)[2].replace("shortcut.", "downsample.")
        names[name.replace("classifier.1.", "fc.")] = tensor
    return names


def test_torchvision_like_names_are_understood(tmp_path):
    model = create("resnet20_cifar")
    torch.save({"state_dict": {f"module.{k}": v for k, v in torchvision_like(model).items()}}, tmp_path / "other.pth")
    loaded = load_model("resnet20_cifar", checkpoint=tmp_path / "other.pth")
    assert torch.equal(loaded(images()), model(images()))


def test_akamasters_names_need_padding_shortcuts(tmp_path):
    model = create("resnet20_cifar", shortcut="padding")
    named = {k.replace("fc.", "linear."): v for k, v in torchvision_like(model).items()}
    torch.save({"state_dict": named}, tmp_path / "akamaster.th.pth")
    loaded = load_model("resnet20_cifar", model_args={"shortcut": "padding"}, checkpoint=tmp_path / "akamaster.th.pth")
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(InputError, match="create it with shortcut=padding"):
        load_model("resnet20_cifar", checkpoint=tmp_path / "akamaster.th.pth")


def test_mdistillers_wide_resnet_names_are_understood():
    model = create("wrn_16_1_cifar")
    named = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("features.0."):
            name = name.replace("features.0.0.", "conv1.")
        elif name.startswith("features."):
            block = int(name.split(".")[1]) - 1
            rest = name.split(".", 2)[2].replace("shortcut.", "convShortcut.")
            name = f"block{block // 2 + 1}.layer.{block % 2}.{rest}"
        named[name.replace("classifier.1.", "fc.").replace("norm.0.", "bn1.")] = tensor
    other = create("wrn_16_1_cifar")
    torch.nn.init.zeros_(other.classifier[1].weight)
    other.load_state_dict(checkpoint_filter_fn(named, other))
    assert torch.equal(other(images()), model(images()))


def test_padding_shortcut_is_option_a():
    """Every second pixel, a quarter of the new channels as zeros before and after (16 to 32 channels: 8 and 8)."""
    block = create("resnet20_cifar", shortcut="padding").features[4]
    x = torch.rand(1, 16, 32, 32)
    found = block.shortcut(x)
    assert found.shape == (1, 32, 16, 16)
    assert torch.equal(found[:, 8:24], x[:, :, ::2, ::2])
    assert not found[:, :8].any()
    assert not found[:, 24:].any()
    with pytest.raises(InputError, match="shortcut must be one of projection, padding"):
        timm.create_model("resnet20_cifar", shortcut="conv")


@EACH
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_networks_are_scripted(name):
    model = create(name)
    assert torch.equal(torch.jit.script(model)(images()), model(images()))


@EACH
def test_pool_size_is_the_side_of_the_last_features(name):
    model = create(name)
    assert model.pretrained_cfg["pool_size"] == tuple(model.forward_features(images()).shape[2:])


@EACH
def test_new_classifier_leaves_frozen_batch_norms_frozen(name):
    model = create(name).train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    model.reset_classifier(5)
    assert not any(norm.training for norm in norms)
    assert model.training
    assert model.get_classifier().training
    model.eval().reset_classifier(3)
    assert not model.get_classifier().training


@EACH
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_colour_are_adapted_to_other_channels_or_refused(name, channels, tmp_path):
    save_model(create(name), tmp_path / "colour")
    arguments = {"pretrained": True, "in_chans": channels}
    if name != "convnet_cifar":
        assert create(f"local-dir:{tmp_path / 'colour'}", **arguments).in_chans == channels
        return
    with pytest.raises(InputError, match=rf"for 3 channels do not fit .*in_chans={channels}.* from random"):
        create(f"local-dir:{tmp_path / 'colour'}", **arguments)
    save_model(create(name, in_chans=channels), tmp_path / "own")
    own = create(f"local-dir:{tmp_path / 'own'}", **arguments)
    assert own(torch.rand(1, channels, 32, 32)).shape == (1, 10)
