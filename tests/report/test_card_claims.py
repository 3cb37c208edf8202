"""What card and page claim of a run is true of that run: its losses, its maps, its seeds, its sizes."""

from dataclasses import replace

import pytest
from hub_parts import make_run, plain_student
from huggingface_hub import ModelCard

from timm_igkd.evaluation.comparison import ArmResult, Comparison, Difference
from timm_igkd.report.card import model_card
from timm_igkd.report.licenses import license_of_start, tell_license
from timm_igkd.report.page import _command, _highlights
from timm_igkd.report.run_facts import RunFacts, read_run
from timm_igkd.report.run_files import TrainingImages
from timm_igkd.report.tables import summary_sentence

pytestmark = pytest.mark.hub


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "first", plain_student()))


def card_of(facts, metrics=None, **config):
    changed = replace(facts, config={**facts.config, **config}, metrics=metrics or facts.metrics)
    return model_card(plain_student(), "user/x", changed)


NO_KD = {"distill_loss_weight": 0.0, "attention_loss_weight": 0.0}


def test_student_without_a_loss_of_its_teacher_is_not_called_distilled(facts):
    card = card_of(facts, **NO_KD)
    assert "distil" not in card.partition("## Use")[0]
    assert ", trained on `noise`, with integrated-gradients maps of `test_resnet` overlaid" in card
    assert "## How it was trained" in card
    assert "knowledge-distillation" not in ModelCard(card).data.tags


@pytest.mark.parametrize("loss", NO_KD)
def test_either_loss_of_the_teacher_makes_a_distilled_student(facts, loss):
    card = card_of(facts, **NO_KD | {loss: 0.5})
    assert ", distilled from `test_resnet` on `noise`, with integrated-gradients maps of the teacher overlaid" in card
    assert "## How it was distilled" in card
    assert "knowledge-distillation" in ModelCard(card).data.tags


def test_teacher_is_the_base_only_of_a_student_that_had_something_of_it(facts):
    named = {"teacher": "resnet18.a1_in1k", "teacher_epochs": 0, "overlay_prob": 0.0}
    assert ModelCard(card_of(facts, **named)).data.base_model == "timm/resnet18.a1_in1k"
    assert ModelCard(card_of(facts, **named | NO_KD)).data.base_model is None


@pytest.mark.parametrize(
    ("config", "is_tagged"),
    [({"overlay_prob": 0.1}, True), ({"explanation_loss_weight": 0.1}, True), ({"stored_logits": True}, False)],
)
def test_only_a_run_that_learnt_from_maps_has_their_tag(facts, config, is_tagged):
    tags = ModelCard(card_of(facts, **{"overlay_prob": 0.0} | config)).data.tags
    assert ("integrated-gradients" in tags) is is_tagged


def test_training_without_labels_has_no_weight_of_the_cross_entropy(facts):
    weights = {"distill_loss_weight": 0.9, "task_loss_weight": None}
    some, none = (replace(facts.metrics, training_images=TrainingImages(n, 100)) for n in (10, 0))
    assert "| Weight of the cross-entropy | 0.1 |" in card_of(facts, some, **weights)
    assert "| Weight of the cross-entropy | 0 |" in card_of(facts, none, **weights)


def test_weights_of_a_comparison_over_seeds_are_one_of_them(facts):
    students = tuple(
        ArmResult(arm, seed, 2, 80.0, 0.5, 0.05, 50, 80.0, 1.0) for arm in ("alone", "kd") for seed in (0, 1, 2)
    )
    difference = Difference("kd", "alone", "seeds", 3, 1.0, 0.5, 1.5)
    card = card_of(facts, replace(facts.metrics, arms=Comparison(students, (difference,))))
    assert "One run with one seed" in card_of(facts)
    assert "One run with one seed" not in card
    assert "those of one of the 3 seeds compared above" in card


@pytest.mark.parametrize(
    ("compression", "shown", "sentence"),
    [
        (5.0, ("5.0\u00d7", "fewer parameters"), "A 5.0\u00d7 smaller student"),
        (0.8, ("1.25\u00d7", "more parameters"), "A student 1.25\u00d7 its teacher's size"),
        (1.0, ("equal", "number of parameters"), "A student of its teacher's size"),
    ],
)
def test_size_of_a_student_is_told_as_it_is(facts, compression, shown, sentence):
    metrics = replace(facts.metrics, compression=compression)
    assert _highlights(metrics)[1] == shown
    assert summary_sentence(metrics).startswith(sentence)


CUT = {"student_init": "teacher"}


@pytest.mark.parametrize(
    ("told", "config", "license"),
    [
        ("cc-by-nc-4.0", {"student_init": "pretrained"}, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", {"student_init": "random"}, "apache-2.0"),
        ("cc-by-nc-4.0", CUT | {"teacher_epochs": 0}, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", CUT | {"teacher_epochs": 3, "teacher_init": "pretrained"}, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", CUT | {"teacher_epochs": 3, "teacher_init": "random"}, "apache-2.0"),
        ("mit", {"student_init": "pretrained", "student_checkpoint": "w.pth"}, "unknown"),
        ("mit", CUT | {"teacher_checkpoint": "w.pth"}, "unknown"),
        ("dinov3-license", {"student_init": "pretrained"}, "dinov3-license"),
        (None, {"student_init": "pretrained"}, "unknown"),
        ("mit", {}, "mit"),
    ],
)
def test_license_is_that_of_the_weights_a_student_started_from(told, config, license):
    assert license_of_start({"license": told}, config) == license


def test_license_is_told_in_what_is_saved_and_an_unknown_one_is_not():
    student = plain_student()
    shared = student.pretrained_cfg
    for license, told in (("mit", "mit"), ("unknown", None)):
        tell_license(student, license)
        assert student.pretrained_cfg["license"] == told
    assert license_of_start(student.pretrained_cfg, {}) == "unknown"
    assert shared.get("license") != "mit"


def test_student_of_which_nothing_is_known_is_not_called_distilled():
    data = ModelCard(model_card(plain_student(), "user/x", RunFacts())).data
    assert "knowledge-distillation" not in data.tags


def test_maps_are_linked_also_where_no_more_is_known_of_them():
    text = model_card(plain_student(), "user/x", RunFacts(), maps_repo="user/maps")
    assert "They are on the Hub: [user/maps](https://huggingface.co/datasets/user/maps)." in text
    assert ModelCard(text).data.datasets == ["user/maps"]


def test_revision_is_the_commit_that_was_read_before_the_branch_that_was_asked_for(facts):
    branch = replace(facts, config=facts.config | {"revision": "main"})
    assert branch.revision == "main"
    assert replace(branch, metrics=replace(facts.metrics, dataset_revision="0" * 40)).revision == "0" * 40


def test_license_that_the_hub_does_not_list_goes_by_its_name(facts):
    student = plain_student()
    student.pretrained_cfg["license"] = "dinov3-license"
    data = ModelCard(model_card(student, "user/x", RunFacts())).data
    assert (data.license, data.license_name) == ("other", "dinov3-license")


@pytest.mark.parametrize(
    ("told", "config", "license"),
    [
        ("mit", {"teacher_epochs": 0}, "mit"),
        ("mit", {"teacher_epochs": 0, "teacher_checkpoint": "w.pth"}, "unknown"),
        ("mit", {"teacher_epochs": 3, "teacher_init": "pretrained"}, "mit"),
        ("mit", {"teacher_epochs": 3, "teacher_init": "random"}, "apache-2.0"),
    ],
)
def test_license_of_a_teacher_is_that_of_its_start(told, config, license):
    assert license_of_start({"license": told}, config, "teacher") == license


def test_card_names_the_license_of_the_start_unless_one_is_given(facts):
    student = plain_student()
    student.pretrained_cfg["license"] = "cc-by-nc-4.0"
    started = replace(facts, config=facts.config | {"student_init": "pretrained"})
    assert ModelCard(model_card(student, "user/x", started)).data.license == "cc-by-nc-4.0"
    assert ModelCard(model_card(student, "user/x", started, license="mit")).data.license == "mit"


def test_command_on_the_page_is_that_of_the_run_or_the_recipes():
    assert _command({"command": "train.py --name 'my run'"}) == "train.py --name 'my run'"
    assert _command({}) == "accelerate launch recipes/train_igkd.py --config config.yaml"


def test_numbers_of_a_part_of_the_split_are_not_called_the_splits(facts):
    n = facts.metrics.n
    for limit, is_part in ((n, True), (n + 1, False), (None, False)):
        card = card_of(facts, test_limit=limit)
        assert (f"n = {n:,} images drawn from it by the seed, read once" in card) == is_part
        (result, *_) = ModelCard(card).data.eval_results
        assert result.dataset_name == ("noise (" + f"{n} images of the split)" if is_part else "noise")


def test_top5_of_five_classes_or_fewer_is_not_told(facts):
    few = replace(
        facts.metrics, top5=100.0, teacher=facts.metrics.teacher and replace(facts.metrics.teacher, top5=100.0)
    )
    for metrics, is_told in ((few, False), (replace(few, top5=99.0), True)):
        card = card_of(facts, metrics=metrics)
        assert ("Top-5 accuracy" in card) == is_told
        names = {result.metric_name for result in ModelCard(card).data.eval_results}
        assert ("Top-5 accuracy, %" in names) == is_told
