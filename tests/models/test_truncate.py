import copy

import pytest
import timm
import torch
from timm.models import get_model_input_config
from torch.optim.swa_utils import AveragedModel

from timm_igkd import truncate
from timm_igkd.errors import InputError
from timm_igkd.models.loading import count_parameters, save_model
from timm_igkd.models.output_names import output_names

SMALL = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"]
WIDE = [
    "resnet18", "mobilenetv2_100", "mobilenetv3_small_050", "regnetx_002", "regnety_002", "densenet121", "vgg11_bn",
    "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "maxvit_tiny_tf_224", "coatnet_pico_rw_224", "mixer_s32_224", "gmlp_ti16_224",
    "resmlp_12_224", "coat_lite_tiny", "pit_xs_224", "poolformer_s12", "levit_128s",
    "efficientformer_l1", "mobilevit_xxs", "hiera_tiny_224", "pvt_v2_b0", "volo_d1_224", "rexnet_100", "dla46_c",
    "nf_regnet_b0", "inception_v3", "legacy_xception", "res2net50_14w_8s", "resnest14d",
]  # fmt: skip


def create(name: str, num_classes: int = 6) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    config = get_model_input_config(model)
    size = config["input_size"][1:] if config["fixed_input_size"] else (96, 96)
    return model, torch.rand(2, 3, *size)


@pytest.fixture
def resnet() -> tuple[torch.nn.Module, torch.Tensor]:
    return create("test_resnet")


def check_truncation(name: str, folder) -> None:
    """Cut by one and by all that can be cut: same features, every parameter used, equal after a reload."""
    model, images = create(name)
    with torch.no_grad():
        features = model.forward_intermediates(images, intermediates_only=True)
    for drop in (1, len(features) - 1):
        student = truncate(model, drop, num_classes=4)
        with torch.no_grad():
            torch.testing.assert_close(student.forward_features(images), features[-1 - drop], rtol=1e-4, atol=1e-4)
            logits = student(images)
        assert logits.shape == (2, 4)
        student.train()(images).sum().backward()
        assert not [name for name, p in student.named_parameters() if p.grad is None]
        save_model(student.eval(), folder / str(drop))
        reloaded = timm.create_model(f"local-dir:{folder / str(drop)}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(reloaded(images), student(images))


@pytest.mark.parametrize("name", SMALL)
def test_truncation_keeps_features_of(name, tmp_path):
    check_truncation(name, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's and torch's own, model by model
@pytest.mark.parametrize("name", WIDE)
def test_truncation_keeps_features_of_family(name, tmp_path):
    check_truncation(name, tmp_path)


def test_papers_network_keeps_its_architecture():
    model = timm.create_model("mobilenetv2_cifar", drop_blocks=9)
    student = truncate(model, 4)
    assert student.pretrained_cfg["architecture"] == "mobilenetv2_cifar"
    assert sum(p.numel() for p in student.parameters()) == 40_970
    assert torch.equal(student.features[5].conv[0][0].weight, model.features[5].conv[0][0].weight)


@pytest.mark.parametrize(("name", "highest"), [("mobilenetv2_cifar", 17), ("test_resnet", 4)])
def test_drop_out_of_range_names_the_range(name, highest):
    model = timm.create_model(name)
    for drop in (-1, highest + 1, 1.0):
        with pytest.raises(InputError, match=f"drop must be a whole number from 0 to {highest} "):
            truncate(model, drop)


def test_range_shrinks_with_what_is_cut(resnet):
    with pytest.raises(InputError, match=r"from 0 to 3 \("):
        truncate(truncate(resnet[0], 1), 4)


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv2_cifar"])
def test_drops_add_up(name):
    model = timm.create_model(name)
    twice, once = truncate(truncate(model, 1), 2), truncate(model, 3)
    head = once.pretrained_cfg["classifier"]
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(t, once.state_dict()[k]) for k, t in twice.state_dict().items() if not k.startswith(head))


def test_drop_zero_copies_the_model(resnet):
    model, images = resnet
    student = truncate(model, 0)
    assert student is not model
    assert torch.equal(student(images), model(images))


def test_a_new_head_has_no_names_of_the_old_one(resnet):
    model, _ = resnet
    model.pretrained_cfg.update(label_names=list("abcdef"), label_descriptions=dict.fromkeys("abcdef", "a letter"))
    for drop in (0, 1):
        student = truncate(model, drop, num_classes=5)
        assert output_names(student) == ({}, False)
        assert "label_descriptions" not in student.pretrained_cfg
    assert output_names(truncate(model, 0)) == output_names(model)
    assert list(output_names(model)[0]) == list("abcdef")


def test_source_model_is_left_alone(resnet):
    model, _ = resnet
    before = copy.deepcopy(model.state_dict())
    for parameter in truncate(model, 2).parameters():
        parameter.data.fill_(0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_head_follows_the_global_seed(resnet):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(truncate(resnet[0], 1).get_classifier().weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_preprocessing_is_the_bases(resnet):
    model, _ = resnet
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    cfg = truncate(model, 1).pretrained_cfg
    for key in ("mean", "std", "input_size", "interpolation", "crop_pct", "fixed_input_size"):
        assert cfg[key] == model.pretrained_cfg[key]
    assert cfg["architecture"] == "igkd_truncated"
    assert cfg["first_conv"] == "base." + model.pretrained_cfg["first_conv"]
    assert not {"url", "hf_hub_id", "file", "label_names"} & cfg.keys()


def test_base_and_its_arguments_are_recorded():
    student = truncate(timm.create_model("test_vit", img_size=80, class_token=False, global_pool="avg"), 2)
    arguments = student._model_args
    assert (arguments["base"], arguments["drop"], arguments["img_size"]) == ("test_vit", 2, (80, 80))
    assert arguments["base_args"] == {"class_token": False, "global_pool": "avg"}
    assert student(torch.rand(1, 3, 80, 80)).shape == (1, 1000)


def test_intermediates_of_a_truncated_model_agree_with_feature_info(resnet):
    student, images = truncate(resnet[0], 2), resnet[1]
    final, intermediates = student.forward_intermediates(images, indices=2)
    assert [f.shape[1] for f in intermediates] == [info["num_chs"] for info in student.feature_info[-2:]]
    assert torch.equal(final, intermediates[-1])
    assert all(info["module"] in dict(student.named_modules()) for info in student.feature_info)


def test_truncated_model_is_a_backbone():
    backbone = timm.create_model("igkd_truncated", base="test_resnet", drop=1, features_only=True, out_indices=(0, 2))
    assert [f.shape[1] for f in backbone(torch.rand(1, 3, 96, 96))] == backbone.feature_info.channels()


def test_truncated_model_takes_one_channel():
    model = timm.create_model("igkd_truncated", base="test_efficientnet", drop=1, in_chans=1, num_classes=3)
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 3)


def test_reset_classifier_of_a_truncated_model(resnet):
    student = truncate(resnet[0], 1)
    student.reset_classifier(9, "catavgmax")
    assert student(resnet[1]).shape == (2, 9)
    assert student.head_hidden_size == 2 * student.num_features


def test_parameter_groups_of_a_truncated_model_match_the_bases():
    model = timm.create_model("test_vit")
    student = truncate(model, 2)
    groups = timm.models.group_parameters(student, student.group_matcher())
    expected = timm.models.group_parameters(model, model.group_matcher())
    assert groups[1] == [f"base.{name}" for name in expected[1]]
    assert groups[len(groups) - 1] == ["head.fc.weight", "head.fc.bias"]
    assert student.no_weight_decay() == {f"base.{name}" for name in model.no_weight_decay()}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet20_cifar", "convnet_cifar"])
def test_a_truncated_models_pooling_stays_where_it_is_truncated_again(name, tmp_path):
    model, images = create(name)
    first = truncate(model, 1)
    first.reset_classifier(4, "catavgmax")
    student = truncate(first, 1).eval()
    head = student.head if hasattr(student, "head") else student
    assert head.global_pool.pool_type == "catavgmax"
    save_model(student, tmp_path / "student")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    assert torch.equal(reloaded(images), student(images))
    first.reset_classifier(0, "")
    assert truncate(first, 1, num_classes=3)(images).shape == (2, 3)  # no pooling suits no classifier
    assert truncate(first, 1)(images).ndim == 4


WRAPPERS = {"compiled": torch.compile, "parallel": torch.nn.DataParallel, "averaged": AveragedModel}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["test_resnet", "resnet20_cifar"])
@pytest.mark.parametrize("drop", [0, 1])
def test_a_wrapped_model_is_truncated_as_the_one_inside(name, wrapper, drop):
    model, images = create(name)
    torch.manual_seed(0)
    expected = truncate(model, drop)
    torch.manual_seed(0)
    student = truncate(WRAPPERS[wrapper](model), drop)
    assert type(student) is type(expected)
    assert torch.equal(student(images), expected(images))


@pytest.mark.parametrize("name", ["hrnet_w18_small", "crossvit_9_240"])
def test_parallel_branches_cannot_be_truncated(name):
    with pytest.raises(InputError, match="parallel branches"):
        truncate(timm.create_model(name), 1)


def test_model_without_intermediates_cannot_be_truncated():
    backbone = timm.create_model("test_resnet", features_only=True)
    backbone.pretrained_cfg["architecture"] = "test_resnet"
    with pytest.raises(InputError, match="has no forward_intermediates"):
        truncate(backbone, 1)


def test_model_of_unknown_origin_cannot_be_truncated():
    with pytest.raises(InputError, match=r"needs a model from timm.create_model, got Linear"):
        truncate(torch.nn.Linear(1, 1), 1)


def test_model_changed_after_building_cannot_be_truncated(resnet):
    resnet[0].layer1[0].conv1 = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(InputError, match=r"not as timm\.create_model built it"):
        truncate(resnet[0], 1)


def test_unknown_base_offers_the_nearest_name():
    with pytest.raises(InputError, match=r"got 'resnet19' \(did you mean 'resnet1"):
        timm.create_model("igkd_truncated", base="resnet19", drop=1)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_cifar"])
def test_a_truncated_model_keeps_its_dropout(name):
    assert truncate(timm.create_model(name, drop_rate=0.3), 1).drop_rate == 0.3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "deit_tiny_patch16_224", "swin_s3_tiny_224"])
def test_dropout_of_an_architecture_that_keeps_no_attribute_of_it_is_kept(name):
    with torch.device("meta"):
        student = truncate(timm.create_model(name, drop_rate=0.3), 1)
    assert student.drop_rate == 0.3
    assert student.head.drop.p == 0.3


def test_a_cut_that_would_leave_everything_is_refused():
    with torch.device("meta"):
        coat = timm.create_model("coat_tiny")
        for drop in (1, 2):
            with pytest.raises(InputError, match=rf"without its last {drop} feature entries keeps 100.0 %"):
                truncate(coat, drop)
        assert count_parameters(truncate(coat, 3)) < count_parameters(coat) / 4
