"""Classes of a model and of the images, brought together by name."""

import json

import pytest
import timm
from model_parts import SMALL
from timm.data import ImageNetInfo
from tiny_parts import tiny_teacher

from timm_igkd import load_model, save_model
from timm_igkd.errors import InputError
from timm_igkd.models import output_names as output_names_module
from timm_igkd.models.output_names import check_class_map, class_indices, renew_head


def with_labels(names, num_classes=3):
    model = timm.create_model("mobilenetv2_cifar", num_classes=num_classes, **SMALL)
    model.pretrained_cfg["label_names"] = names
    return model


def test_same_classes_need_no_indices():
    assert class_indices(with_labels(["a", "b", "c"]), ["a", "b", "c"], 3) is None


@pytest.mark.parametrize("names", [(None, ["a", "b", "c"]), (["a", "b", "c"], None), (None, None)])
def test_unnamed_classes_of_the_same_number_need_no_indices(names):
    assert class_indices(with_labels(names[0]), names[1], 3) is None


def test_permuted_classes_are_found_by_name():
    assert class_indices(with_labels(["a", "b", "c"]), ["c", "a", "b"], 3) == [2, 0, 1]


def test_subset_of_classes_is_found_by_name():
    assert class_indices(with_labels(["a", "b", "c"]), ["c", "b"], 2) == [2, 1]


@pytest.mark.parametrize("names", [["a", "b", "a"], {"0": "a", "1": "b", "2": "a"}])
def test_a_class_that_is_the_name_of_two_outputs_is_refused(names):
    model = with_labels(names)
    with pytest.raises(InputError, match="the model has 2 outputs called 'a', expected one for the dataset's class"):
        class_indices(model, ["b", "a"], 2)
    with pytest.raises(InputError, match="the model has 2 outputs called 'a', expected one for the dataset's class"):
        check_class_map(model, {"a": 2, "b": 1})
    assert class_indices(model, ["b"], 1) == [1]  # nobody asks for the other


def test_a_model_whose_outputs_share_names_loads(tmp_path):
    save_model(with_labels(["a", "b", "a"]), tmp_path / "model")
    assert load_model(f"local-dir:{tmp_path / 'model'}").num_classes == 3


def test_label_dictionary_is_read():
    assert class_indices(with_labels({"0": "a", "2": "c"}), ["c"], 1) == [2]


def test_imagenet_classes_are_found_by_wordnet_id():
    model = timm.create_model("test_resnet", num_classes=1000)
    assert class_indices(model, ["n01440764", "n02102040"], 2) == [0, 217]


@pytest.mark.parametrize(
    ("labels", "class_names", "num_classes"),
    [(["a", "b", "c"], ["a", "x"], 2), (["a", "b", "c"], ["a", "b", "x"], 3), (None, ["a", "b"], 2), (None, None, 4)],
)
def test_other_classes_are_an_error(labels, class_names, num_classes):
    with pytest.raises(InputError, match=f"the model has 3 classes.*the dataset has {num_classes}; use a model"):
        class_indices(with_labels(labels), class_names, num_classes)


@pytest.mark.parametrize("names", [{"a": "cat", "1": "dog"}, {"7": "cat"}, {"-1": "cat"}, {"0": "cat", "00": "dog"}])
def test_names_by_no_number_of_an_output_are_refused(names, tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_names": names}))
    with pytest.raises(InputError, match=r"label_names of config\.json in .* must be by the number of an output"):
        load_model(f"local-dir:{tmp_path / 'model'}")


@pytest.fixture
def imagenet_model():
    return tiny_teacher(classes=1000)


INFO = ImageNetInfo("imagenet-1k")
TEXTS = [INFO.label_name_to_description(name) for name in INFO.label_names()]


def test_imagenets_words_in_the_order_of_the_outputs_need_no_indices(imagenet_model):
    for names in (TEXTS, [text.split(",")[0] for text in TEXTS]):  # a few words are ambiguous
        assert class_indices(imagenet_model, names, 1000) is None


def test_imagenets_words_in_another_order_are_found_by_name(imagenet_model):
    texts = [INFO.label_names()[number] if number == 517 else text for number, text in enumerate(TEXTS)]  # a crane
    with pytest.raises(
        InputError, match=r"class 'crane' is the word of two of ImageNet's classes, .* by its WordNet id"
    ):
        class_indices(imagenet_model, sorted(texts), 1000)
    names = sorted(INFO.label_names()[number] if "crane" in text else text for number, text in enumerate(TEXTS))
    numbers = {**{text: n for n, text in enumerate(TEXTS)}, **{name: n for n, name in enumerate(INFO.label_names())}}
    assert class_indices(imagenet_model, names, 1000) == [numbers[name] for name in names]


def test_two_names_of_one_class_of_imagenets_are_told(imagenet_model):
    names = sorted(INFO.label_names())[::-1]
    names[0] = INFO.label_name_to_description(names[1])
    with pytest.raises(InputError, match=r"are one of ImageNet's, and not two"):
        class_indices(imagenet_model, names, 1000)


def test_words_are_found_among_the_ids_that_an_exported_file_names(imagenet_model):
    imagenet_model.pretrained_cfg["label_names"] = INFO.label_names()
    assert class_indices(imagenet_model, TEXTS, 1000) is None


def test_one_class_that_is_not_imagenets_moves_no_other(imagenet_model):
    with pytest.raises(InputError, match=r"'background' is none of ImageNet's by its id or words"):
        class_indices(imagenet_model, ["background", *INFO.label_names()[:999]], 1000)


def test_classes_of_other_names_are_taken_in_order_and_it_is_said(imagenet_model, capfd):
    output_names_module._note_order.cache_clear()
    for _ in range(2):
        assert class_indices(imagenet_model, [f"class {number}" for number in range(1000)], 1000) is None
    assert capfd.readouterr().err.count("they are taken for the model's 1000 outputs in their order") == 1


WORDS = [ImageNetInfo().index_to_description(index) for index in range(1000)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("names", "is_kept"),
    [
        (ImageNetInfo().label_names(), True),
        (WORDS, True),
        ([*WORDS[:950], *(f"other {index}" for index in range(50))], True),  # ambiguous words
        ([*WORDS[:800], *(f"other {index}" for index in range(200))], False),
        (WORDS[::-1], False),
        ([f"class {index}" for index in range(1000)], False),
        (None, True),
    ],
)
def test_head_of_imagenets_classes_is_kept_for_their_ids_and_words_in_order(known, names, is_kept):
    model = timm.create_model("test_resnet", num_classes=1000)
    if known:
        model.pretrained_cfg["label_names"] = ImageNetInfo().label_names()
    before = model.get_classifier().weight
    renew_head(model, names, 1000)
    assert (model.get_classifier().weight is before) is is_kept
