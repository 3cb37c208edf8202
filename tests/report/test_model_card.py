"""The model card of a run's student: results, settings, robustness, sources, seeds."""

import re
from dataclasses import replace
from typing import get_args

import pytest
import timm
import yaml
from card_parts import ARXIV, HOSTILE, table_row
from hub_parts import code_blocks, plain_student, plugin_student
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from timm_igkd.attribution.ig_options import METHOD_PAPERS, IGOptions, Method
from timm_igkd.files import read_mapping
from timm_igkd.maps.card import dataset_card
from timm_igkd.models.loading import save_model
from timm_igkd.report.card import base_models, model_card
from timm_igkd.report.run_facts import RunFacts, read_run
from timm_igkd.report.run_files import parse_metrics
from timm_igkd.runs.parsing import save_config
from timm_igkd.runs.settings import RunConfig

pytestmark = pytest.mark.hub


def test_metadata_of_the_model_card_is_valid(card):
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert {"timm", "knowledge-distillation", "integrated-gradients"} <= set(data.tags)
    assert data.datasets == ["user/maps"]
    results = {result.metric_name: result for result in data.eval_results}
    assert results["Top-1 accuracy, %"].metric_value == 80.0
    assert results["Top-1 accuracy, %"].metric_type == "accuracy"
    assert results["Top-1 accuracy, %"].dataset_split == "test"
    assert ModelCard(card).data.to_dict()["model-index"][0]["name"] == "student"


def test_card_tells_results_with_n_and_interval(card):
    assert "n = 50 images" in card
    assert table_row(card, "Top-1 accuracy") == "| Top-1 accuracy | 90.0\u202f% | 80.0\u202f% | \u221210.0 points |"
    assert "67.0\u201388.8" in table_row(card, "95\u202f% Wilson interval")


def test_card_tells_size_speed_and_hardware(card):
    assert "400,000" in table_row(card, "Parameters")
    assert "80\u202fM" in table_row(card, "Multiply-accumulates per image")
    assert "2.00\u202fms" in table_row(card, "Latency, one image")
    assert "on Some CPU @ 2 GHz, device cpu, torch threads: 2" in card


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_code_of_a_card_reads_images_of_the_students_channels(in_chans, tmp_path, capsys):
    student = timm.create_model("test_resnet", num_classes=2, in_chans=in_chans)
    save_model(student, tmp_path / "student", label_names=["a", "b"])
    student = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    (usage,) = code_blocks(model_card(student, "user/x", RunFacts()))
    exec(usage.replace("hf-hub:user/x", f"local-dir:{tmp_path / 'student'}"), {})
    assert capsys.readouterr().out.split()[0] in ("a", "b")


def test_card_tells_how_it_was_distilled(card):
    assert table_row(card, "Overlay probability") == "| Overlay probability | 0.1 |"
    assert "the teacher without its last 2 blocks" in table_row(card, "Student")
    assert table_row(card, "Weight of the cross-entropy") == "| Weight of the cross-entropy | 0.99 |"
    assert table_row(card, "Integration steps") == "| Integration steps | 2 |"
    assert "Most steps of an image" not in card
    assert table_row(card, "Engine") == "| Engine | fast, float32 |"
    assert "https://huggingface.co/datasets/user/maps" in card


def test_every_setting_that_moves_the_weights_moves_the_card(tmp_path):
    """Also one that does not exist yet: the table is made from the run's settings, not from a list of them."""
    save_config(RunConfig(student=None), tmp_path / "config.yaml")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"new_setting": 7}
    student = plain_student()
    card = model_card(student, "user/x", RunFacts(config=config))
    still = []
    for name, value in config.items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "teacher"
        if model_card(student, "user/x", RunFacts(config=config | {name: other})) == card:
            still.append(name)
    of_maps = "engine map_method n_steps max_steps tolerance map_baseline map_target map_output map_reduction map_size"
    assert still == f"name output_dir resume corruptions maps {of_maps} workers trackers compare seeds export".split()
    assert table_row(card, "New setting") == "| New setting | 7 |"


def test_settings_are_told_in_words(plugin_run):
    config = {
        "model_ema": True,
        "grad_accum_steps": 2,
        "clip_grad": 1.5,
        "min_lr": 1e-5,
        "warmup_epochs": 1,
        "aa": None,
    }
    config |= {"teacher_checkpoint": "/home/me/w.pth", "student_args": {"drop": 2}, "teacher_args": {}}
    card = model_card(plain_student(), "user/x", RunFacts(config=read_run(plugin_run).config | config))
    for name, value in {
        "Moving average of the weights": "yes",
        "Batches per optimiser step": "2",
        "Largest gradient norm": "1.5",
        "Last learning rate": "1e-05",
        "Warmup epochs": "1",
        "Weights of the teacher": "w.pth",
        "Arguments of the student": "drop=2",
    }.items():
        assert table_row(card, name) == f"| {name} | {value} |"
    assert "Auto-augment" not in card
    assert "Arguments of the teacher" not in card


def test_card_tells_the_latency_in_onnxruntime_where_it_was_measured(card, plugin_run):
    assert "onnxruntime" not in card
    metrics = metrics_of(plugin_run, onnx_latency_ms={"batch_1": {"median": 0.5, "p90": 0.75, "n": 9}})
    told = model_card(plain_student(), "user/x", replace(read_run(plugin_run), metrics=metrics))
    assert "0.5\u202fms (p90 0.75)" in table_row(told, "Latency in onnxruntime, one image")
    slow = {"batch_64": {"median": 1234.5, "p90": 23456.7, "n": 9}}
    told = model_card(
        plain_student(), "user/x", replace(read_run(plugin_run), metrics=metrics_of(plugin_run, onnx_latency_ms=slow))
    )
    assert "1,234\u202fms (p90 23,457)" in table_row(told, "Latency in onnxruntime, batch of 64")


def test_card_cites_the_paper_ig_and_kd(card, store):
    (citations,) = code_blocks(card, "bibtex")
    for text in (citations, dataset_card(store.provenance)):
        assert all(number in text for number in ARXIV)
    assert citations.count("{") == citations.count("}")


@pytest.mark.parametrize("method", get_args(Method))
def test_cards_cite_the_paper_of_the_method_that_was_used_and_no_other(plugin_run, store, method):
    maps = replace(store.provenance, options=IGOptions(method=method), logits=True)
    facts = replace(read_run(plugin_run), provenance=maps)
    wanted = {number for number in (ARXIV[0], METHOD_PAPERS[method], ARXIV[2]) if number}
    for card in (dataset_card(maps), model_card(plain_student(), "user/x", facts)):
        (block,) = code_blocks(card, "bibtex")
        assert {*re.findall(r"eprint = {(.*)}", block)} == wanted


def test_card_of_a_run_without_maps_cites_none_of_their_methods(plugin_run):
    facts = read_run(plugin_run)
    plain = replace(facts, config={**facts.config, "overlay_prob": 0})
    (block,) = code_blocks(model_card(plain_student(), "user/x", plain), "bibtex")
    assert re.findall(r"eprint = {(.*)}", block) == [ARXIV[0], ARXIV[2]]


def test_first_line_of_usage_imports_the_plugin_where_it_is_needed(card):
    assert code_blocks(card)[0].startswith("import timm_igkd")
    plain = model_card(plain_student(), "user/plain", RunFacts())
    assert code_blocks(plain)[0].startswith("import timm\n")
    assert "timm_igkd" not in code_blocks(plain)[0]


def test_card_without_a_run_tells_what_the_model_tells():
    card = model_card(plain_student(), "user/plain", RunFacts())
    assert ModelCard(card).data.eval_results is None
    assert "## Results" not in card
    assert "## How it was distilled" not in card
    assert "No results came with these weights" in card
    assert "Parameters" in card


ROBUSTNESS = {
    "top1": 63.25,
    "n": 1000,
    "kinds": {"jpeg": [80.0, 75.0, 72.5, 70.0, 60.0], "gaussian_noise": [75.0, 65.0, 55.0, 45.0, 35.0]},
}


def metrics_of(plugin_run, **more):
    return parse_metrics(read_mapping(plugin_run / "metrics.json") | more, "metrics.json")


def with_robustness(plugin_run, teachers):
    teacher = read_mapping(plugin_run / "metrics.json")["teacher"] | {"robustness": teachers}
    return metrics_of(plugin_run, robustness=ROBUSTNESS, teacher=teacher)


def test_card_tells_robustness_by_corruption_and_severity(plugin_run):
    card = model_card(plain_student(), "user/x", RunFacts(metrics=metrics_of(plugin_run, robustness=ROBUSTNESS)))
    assert "corruption: **63.2 %**, n = 1,000 images" in card
    assert "each of 2\nkinds" in card
    assert table_row(card, "jpeg") == "| jpeg | 80.0 | 75.0 | 72.5 | 70.0 | 60.0 | 71.5 |"
    assert table_row(card, "gaussian noise") == "| gaussian noise | 75.0 | 65.0 | 55.0 | 45.0 | 35.0 | 55.0 |"
    assert "Robustness to noise, blur, compression or shifted data has not been measured" not in card


def test_card_tells_robustness_once(plugin_run):
    card = model_card(plain_student(), "user/x", RunFacts(metrics=with_robustness(plugin_run, ROBUSTNESS)))
    assert card.count("jpeg") == card.count("gaussian noise") == 1
    assert "under corruption" not in card[: card.index("## Robustness")]


def test_card_of_a_control_does_not_speak_of_its_own_maps(plugin_run):
    facts = read_run(plugin_run)
    own = model_card(plain_student(), "user/x", facts)
    assert "overlaid with the teacher's integrated-gradients map of it, with probability\n0.1." in own
    control = RunFacts(
        config=facts.config | {"overlay_source": "shuffled"}, metrics=facts.metrics, provenance=facts.provenance
    )
    card = model_card(plain_student(), "user/x", control)
    assert "with the control `shuffled` overlaid on part of the training images" in card
    assert "This is a control: with probability 0.1 each training image was overlaid with `shuffled`" in card


def test_card_names_the_method_of_its_maps(plugin_run):
    facts = read_run(plugin_run)
    maps = replace(facts.provenance, options=IGOptions(method="grad_cam"))
    card = model_card(plugin_student(), "user/x", replace(facts, provenance=maps))
    assert table_row(card, "Method").split("|")[2].strip() == "grad\\_cam"
    assert "teacher's Grad-CAM map of it" in card
    assert "Grad-CAM maps of the teacher overlaid" in card
    assert "| Integration steps |" not in card
    assert "convergence delta" not in card


def test_card_of_a_student_of_stored_logits_speaks_of_no_map(plugin_run):
    facts = read_run(plugin_run)
    logits = replace(facts.provenance, options=IGOptions(method="none"), logits=True, map_size=None)
    config = facts.config | {"overlay_prob": 0.0, "explanation_loss_weight": 0.0, "stored_logits": True}
    run = replace(facts, config=config, provenance=logits)
    card = model_card(plain_student(), "user/x", run, maps_repo="user/logits")
    assert "learnt from stored logits, which are on the Hub: [user/logits](https" in card
    assert "| Stored logits of the teacher | yes |" in card
    assert "Attribution maps" not in card
    assert "stored logits, which" not in model_card(plain_student(), "user/x", run)
    assert "stored logits, which" not in model_card(plain_student(), "user/x", RunFacts(), maps_repo="user/maps")


def test_every_table_of_both_cards_is_whole(plugin_run, store):
    """Rows have their header's number of cells, and no header is empty all over."""
    full = replace(read_run(plugin_run), metrics=metrics_of(plugin_run, robustness=ROBUSTNESS))
    for card in (model_card(plain_student(), "user/x", full), dataset_card(store.provenance, "user/maps")):
        tables = re.findall(r"(?m)(?:^\|.*\|\n)+", card)
        assert len(tables) >= 2
        for table in tables:
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
            assert len({len(row) for row in rows}) == 1
            assert any(cell.strip() for cell in rows[0])
            assert set("".join(rows[1])) == {"-"}


def test_card_tells_the_teachers_robustness_beside_it(plugin_run):
    metrics = with_robustness(plugin_run, ROBUSTNESS | {"top1": 70.04})
    assert "**63.2 %** (teacher 70.0 %), n =" in model_card(plain_student(), "user/x", RunFacts(metrics=metrics))


def test_card_says_that_robustness_was_not_measured(card):
    assert "## Robustness" not in card
    assert "Robustness to noise, blur, compression or shifted data has not been measured" in card


def test_hostile_names_break_neither_metadata_nor_tables(plugin_run):
    facts = read_run(plugin_run)
    hostile = RunFacts(config=facts.config | {"aa": HOSTILE, "dataset": "digits\n---\nx: 1"}, metrics=facts.metrics)
    card = model_card(plain_student(), "user/x", hostile)
    assert ModelCard(card).data.library_name == "timm"
    row = table_row(card, "Auto-augment")
    assert "<script>" not in row.replace("\\<", "")
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_base_model_is_the_pretrained_teacher_on_the_hub():
    assert base_models({"teacher": "hf-hub:user/teacher@v1"}, True) == ["user/teacher"]
    assert base_models({"teacher": "resnet18.a1_in1k"}, True) == ["timm/resnet18.a1_in1k"]
    assert base_models({"teacher": "resnet18"}, True) == ["timm/resnet18.a1_in1k"]
    assert base_models({"teacher": "resnet18"}, False) == []
    assert base_models({"teacher": "resnet18", "teacher_epochs": 3}, True) == []
    assert base_models({"teacher": "resnet18", "teacher_checkpoint": "x.pth"}, True) == []
    assert base_models({"teacher": "local-dir:teacher"}, True) == []
    assert base_models({}, True) == []


def test_weights_that_the_student_started_from_are_its_first_base():
    config = {"teacher": "resnet18", "student": "resnet10t", "student_init": "pretrained"}
    assert base_models(config, True) == ["timm/resnet10t.c3_in1k", "timm/resnet18.a1_in1k"]
    assert base_models(config, False) == ["timm/resnet10t.c3_in1k"]
    assert base_models(config | {"student": "resnet18"}, True) == ["timm/resnet18.a1_in1k"]
    for change in ({"student_init": "random"}, {"student_checkpoint": "x.pth"}):
        assert base_models(config | change, True) == ["timm/resnet18.a1_in1k"]


def test_paths_in_arguments_of_a_model_are_shown_by_their_last_part(plugin_run):
    facts = read_run(plugin_run)
    arguments = {"weights": "/home/me/secret/w.pth", "more": ["/home/me/v.pth"], "width": 3}
    told = RunFacts(config=facts.config | {"student_args": arguments}, metrics=facts.metrics)
    card = model_card(plain_student(), "user/x", told)
    assert "weights=w.pth, more=v.pth, width=3" in card
    assert "/home" not in card
