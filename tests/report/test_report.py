"""The page of a run: every section, self-contained, escaped, the same from the same files."""

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_parts import NUMBERS, provenance_of, tiny_score

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.evaluation.comparison import ArmResult, Comparison, Difference
from timm_igkd.intervals import three_digits
from timm_igkd.overlay.preview import Sample
from timm_igkd.records import write_record
from timm_igkd.report.page import write_report
from timm_igkd.report.run_files import parse_metrics, update_metrics
from timm_igkd.report.sections import Disagreement, collect_disagreements
from timm_igkd.report.tables import (
    confused_pairs,
    confusion_matrix,
    duration,
    large,
    percent,
    ratio,
    result_rows,
    signed,
    summary_sentence,
)

pytest.importorskip("matplotlib")
SECTIONS = ["setup", "results", "curves", "samples", "confusion", "calibration", "disagreement"]
SECTIONS += ["size", "usage", "provenance"]
HOSTILE = "<script>alert('x')</script>\"&"


HISTORY = """epoch,lr,loss,task_loss,distill_loss,attention_loss,top1_train,val_loss,val_top1,seconds
0,0.001,2.0,1.9,0.4,,40.0,1.5,50.0,1.0
1,0.001,1.0,0.9,0.2,,70.0,0.8,75.0,1.0
"""


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "digits", 3)


def make_run(folder, num_classes, with_teacher=True, n=30):
    (folder / "maps").mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(n) % num_classes
    student, teacher = (rng.normal(size=(n, num_classes)).astype("f4") for _ in range(2))
    side = {
        "top1": 80.0,
        "top5": 100.0,
        "loss": 0.5,
        "ece": 0.04,
        "num_parameters": 2_000_000,
        "macs": 8e7,
        "size_mb": 8.0,
    }
    side |= {"n": n, "dataset": "digits", "split": "test", "device": "cpu", "threads": 2, "hardware": "a processor"}
    side["latency_ms"] = {f"batch_{b}": {"median": 2.0 * b, "p90": 3.0 * b, "n": 9} for b in (1, 64)}
    metrics = side | {"num_parameters": 500_000, "needs_plugin": True, "wall_time_s": {"teacher": 70.2, "report": 0.8}}
    if with_teacher:
        metrics |= {"teacher": side, "compression": 4.0, "agreement": 90.0, "teacher_kl": 0.1}
    arrays = {"labels": labels, "student_logits": student}
    arrays["class_names"] = np.array([HOSTILE, *(f"class {i}" for i in range(1, num_classes))])
    if with_teacher:
        arrays["teacher_logits"] = teacher
    np.savez(folder / "predictions.npz", **arrays)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = {
        "name": "digits",
        "teacher": "test_resnet",
        "student": None,
        "student_drop": 1,
        "seed": 7,
        "overlay_prob": 0.1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15", "command": "train_igkd.py --name digits"}))
    write_record(folder / "maps" / "provenance.json", provenance_of(90, n_steps=50))
    (folder / "student_history.csv").write_text(HISTORY)
    (folder / "teacher_history.csv").write_text(HISTORY.replace(",0.4,", ",,").replace(",0.2,", ",,"))
    return folder


def test_accuracy_under_corruption_stands_beside_the_teachers():
    def side(top1):
        return {"top1": top1, "n": 500, "kinds": {"jpeg": [top1] * 5, "gaussian_noise": [top1 - 10] * 5}}

    def rows(**more):
        return {row[0]: row for row in result_rows(parse_metrics(NUMBERS | more, "metrics.json"))}

    alone = rows(robustness=side(70.0))
    assert alone["… gaussian noise"][2] == percent(60.0)
    both = rows(robustness=side(70.0), teacher=NUMBERS | {"robustness": side(72.0)})
    (mean,) = (row for name, row in both.items() if name.startswith("Top-1 under corruption (mean; 500 images"))
    assert tuple(mean[1:3]) == (percent(72.0), percent(70.0))
    assert not any("corruption" in name for name in rows())


def sample(label, size=(8, 8)):
    return Sample(Image.new("RGB", size, "navy"), Image.new("L", size, 128), Image.new("RGB", size, "grey"), label)


class Page(HTMLParser):
    """Collects tags, resources and text outside style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.resources, self.ids, self.images = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.resources += [
            attributes[key] for key in ("src", "href", "xlink:href", "action", "data") if key in attributes
        ]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images += [attributes] if tag == "img" else []


def read_page(run_dir, **arguments):
    text = write_report(run_dir, **arguments).read_text(encoding="utf-8")
    return text, Page(text)


def test_every_section_is_present_and_ids_are_unique(run_dir):
    text, page = read_page(run_dir, samples=[sample("one")])
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(set(page.ids)) == len(page.ids)
    assert (
        "4.0× smaller student reaches 80.0\u202f% (24 of 30 images; 95\u202f% Wilson interval 62.7–90.5\u202f%)" in text
    )
    assert "import timm_igkd" in text
    assert "train_igkd.py --name digits" in text


def test_page_is_self_contained(run_dir):
    disagreement = Disagreement(Image.new("RGB", (8, 8)), "a", "a", "b", 0.9, 0.5)
    text, page = read_page(run_dir, samples=[sample("one")], disagreements=[disagreement])
    assert page.resources
    assert all(resource.startswith(("#", "data:")) for resource in page.resources)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "script" not in page.tags
    assert len(page.images) == 4
    assert all(image["alt"] for image in page.images)


def test_names_from_the_data_are_escaped(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) | {"name": HOSTILE, "teacher": HOSTILE}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    disagreement = Disagreement(Image.new("RGB", (8, 8)), HOSTILE, HOSTILE, HOSTILE, 0.9, 0.5)
    text, page = read_page(run_dir, samples=[sample(HOSTILE)], disagreements=[disagreement])
    assert "script" not in page.tags
    assert "<script" not in text
    assert "&lt;script&gt;alert" in text


def test_svg_follows_the_colours_of_the_page(run_dir):
    text, page = read_page(run_dir)
    assert page.tags.count("svg") == 5
    assert "var(--student)" in text
    assert "#01020" not in text
    assert "<metadata" not in text


def test_equal_inputs_give_an_equal_page(run_dir):
    assert read_page(run_dir, samples=[sample("one")])[0] == read_page(run_dir, samples=[sample("one")])[0]


@pytest.mark.parametrize(
    ("milliseconds", "shown"), [(1.234, "1.23"), (999.4, "999"), (999.6, "1,000"), (1234.5, "1,234")]
)
def test_a_latency_is_told_in_three_digits_and_never_in_powers_of_ten(milliseconds, shown, run_dir):
    content = json.loads((run_dir / "metrics.json").read_text())
    content["latency_ms"]["batch_1"]["median"] = milliseconds
    (run_dir / "metrics.json").write_text(json.dumps(content))
    text, _ = read_page(run_dir)
    assert f"<dd>{shown}\u202fms</dd>" in text
    assert "e+0" not in text


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_note_under_the_results_knows_how_many_seeds_were_compared(seeds, run_dir):
    students = [
        ArmResult(arm, seed, 2, 80.0, 0.5, 0.05, 30, 80.0, 1.0) for arm in ("alone", "kd") for seed in range(seeds)
    ]
    difference = Difference("kd", "alone", "seeds" if seeds > 1 else "images", seeds, 1.0, 0.5, 1.5)
    update_metrics(run_dir / "metrics.json", {"arms": asdict(Comparison(tuple(students), (difference,)))})
    text, _ = read_page(run_dir)
    assert ("One training run (seed 7)." in text) == (seeds == 1)
    assert ("The student here is that of one of the 3 seeds compared above (seed 7)." in text) == (seeds == 3)


def test_released_teacher_has_no_history(run_dir):
    (run_dir / "teacher_history.csv").unlink()
    text, _ = read_page(run_dir)
    assert "The teacher came with its weights" in text
    assert "its pretrained weights" in text


def test_run_without_maps_and_validation_still_has_every_section(run_dir):
    (run_dir / "maps" / "provenance.json").unlink()
    lines = [line.rsplit(",", 3) for line in HISTORY.splitlines()]
    rows = [",".join([head, "", "", seconds]) for head, _, _, seconds in lines[1:]]
    (run_dir / "student_history.csv").write_text("\n".join([HISTORY.splitlines()[0], *rows]))
    text, page = read_page(run_dir)
    assert "This run used no maps." in text
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS


@pytest.mark.parametrize(
    ("method", "words"),
    [("grad_cam", "90 Grad-CAM maps: target label, output logit, reduction positive"), ("ig", None)],
)
def test_page_says_which_method_made_the_maps(method, words, run_dir):
    write_record(run_dir / "maps" / "provenance.json", provenance_of(90, method=method))
    page = write_report(run_dir, samples=[sample("a")]).read_text()
    assert (words or "90 integrated-gradients maps: n_steps 50, baseline mean, target label") in page
    assert ("integrated-gradients map" in page) == (method == "ig")
    assert f"the teacher’s {'Grad-CAM' if method == 'grad_cam' else 'integrated-gradients'} map (bright" in page


def test_page_tells_a_score_beside_the_maps_and_ignores_one_of_others(run_dir):
    maps = provenance_of(90, n_steps=50)
    write_record(run_dir / "maps" / "score.json", tiny_score(maps))
    page = write_report(run_dir).read_text()
    assert '<section id="faithfulness">' in page
    assert "interval over 7 images, 2 equal shares" in page
    assert "0.250 [0.125, 0.375]" in page
    write_record(run_dir / "maps" / "score.json", tiny_score(replace(maps, keys_hash="1" * 32)))
    assert "faithful" not in write_report(run_dir).read_text()


def test_model_without_teacher_has_a_page(tmp_path):
    text, page = read_page(make_run(tmp_path / "alone", 3, with_teacher=False))
    assert "The model reaches 80.0" in text
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS


def test_many_classes_show_pairs_instead_of_a_matrix(tmp_path):
    text, _ = read_page(make_run(tmp_path / "many", 31, n=93))
    assert "Most confused classes" in text
    assert 'class="matrix' not in text
    assert "&lt;script&gt;" in text


def test_unfinished_run_is_refused(run_dir):
    (run_dir / "metrics.json").unlink()
    with pytest.raises(MissingFileError, match=r"metrics\.json is missing, expected a finished run"):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


def test_damaged_file_is_named(run_dir):
    (run_dir / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.json' is not JSON"):
        write_report(run_dir)


def test_missing_matplotlib_names_the_extra(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'timm-igkd\[demo\]'"):
        write_report(run_dir)


def test_disagreements_are_those_of_the_predictions(run_dir):
    arrays = np.load(run_dir / "predictions.npz")
    dataset = [(Image.new("RGB", (4, 4), (i, 0, 0)), int(label)) for i, label in enumerate(arrays["labels"])]
    found = collect_disagreements(run_dir, dataset, limit=100)
    student, teacher = arrays["student_logits"].argmax(1), arrays["teacher_logits"].argmax(1)
    assert len(found) == (student != teacher).sum() > 0
    for item in found:
        i = item.image.getpixel((0, 0))[0]
        names = arrays["class_names"]
        assert (item.label, item.student, item.teacher) == (names[dataset[i][1]], names[student[i]], names[teacher[i]])
    assert sorted((item.student_confidence for item in found), reverse=True) == [d.student_confidence for d in found]
    with pytest.raises(InputError, match="predictions of 30 images, the dataset 29"):
        collect_disagreements(run_dir, dataset[:-1])


@pytest.mark.parametrize("compression", [8.2, 11.0, 18.4, 84, 812])
def test_a_factor_that_begins_with_a_vowel_has_its_article(compression):
    metrics = parse_metrics(NUMBERS | {"compression": compression, "teacher": NUMBERS}, "metrics.json")
    assert summary_sentence(metrics).startswith(f"An {ratio(compression)} smaller student")


@pytest.mark.parametrize(("compression", "shown"), [(1.5, "1.50×"), (5.9, "5.9×"), (110, "110×"), (180, "180×")])
def test_any_other_factor_has_its_article(compression, shown):
    metrics = parse_metrics(NUMBERS | {"compression": compression, "teacher": NUMBERS}, "metrics.json")
    assert summary_sentence(metrics).startswith(f"A {shown} smaller student")


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    metrics = parse_metrics(NUMBERS | {"teacher": NUMBERS | {"ece": NUMBERS["ece"] + 1e-5}}, "metrics.json")
    (row,) = [row for row in result_rows(metrics) if row.name.startswith("Expected calibration error")]
    assert row.comparison == "+0.000"
    assert [signed(value, 1) for value in (-0.04, -0.06, 0.0)] == ["+0.0", "\u22120.1", "+0.0"]


def test_confused_pairs_are_sorted_mistakes():
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), 3)
    assert confused_pairs(matrix, ["a", "b", "c"])[:2] == [("a", "b", "2", "67\u202f%"), ("c", "a", "1", "100\u202f%")]


def test_large_numbers_and_durations_end_in_the_next_unit():
    assert [large(n) for n in (999, 999_400, 999_600, 2.5e6, 1e12)] == [
        "999",
        "999\u202fk",
        "1\u202fM",
        "2.5\u202fM",
        "1,000\u202fG",
    ]
    assert [three_digits(n) for n in (0.58, 999.4, 999.6, 1058.2)] == ["0.58", "999", "1,000", "1,058"]
    assert [duration(s) for s in (59.94, 59.97, 3599.7)] == [
        "59.9\u202fs",
        "1\u202fmin 0\u202fs",
        "1\u202fh 0\u202fmin",
    ]
