"""The pages of a study's report: complete, self-contained, the same for equal rows."""

import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import yaml
from command_lines import RECIPES
from study_parts import (
    ALIGNED,
    IG,
    KD,
    PRIMARY_CELLS,
    PRIMARY_CONTRASTS,
    add_rows,
    edit_rows,
    helpful_study,
    primary_study,
    report,
)

from studies.compression import _arms
from studies.facts import facts
from studies.figures import FIGURES, corruptions, quantiles
from studies.report import write_report
from studies.results import StudyResults
from studies.rows import StudyRows
from studies.sensitivity import sensitivity_table
from studies.statistics import Comparison
from studies.tables import (
    cells_table,
    contrast_table,
    corruption_table,
    signed,
    span,
)
from study_report import main
from timm_igkd.errors import InputError


class Page(HTMLParser):
    """Collects tags, ids and resources."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.resources, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.resources += [attributes[key] for key in ("src", "href", "xlink:href", "data") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []


@pytest.fixture(scope="module")
def pages(helpful, tmp_path_factory):
    """Markdown and page of the primary study and one that was not run."""
    waiting = primary_study(tmp_path_factory.mktemp("none"), name="waiting", title="Waiting", purpose="exploratory")
    return report(tmp_path_factory.mktemp("pages"), helpful.config, waiting)


def test_every_number_of_the_contrast_table_is_in_both_files(helpful, pages):
    found = helpful.contrasts("top1")[0].comparison
    for text in pages:
        assert signed(found.difference) in html.unescape(text)
        assert f"{signed(found.low)} to {signed(found.high)}" in html.unescape(text)


def test_page_is_self_contained_and_ids_are_unique(pages):
    page = Page(pages[1])
    assert all(resource.startswith(("#", "data:")) for resource in page.resources)
    assert not re.search(r"url\((?!#)|@import|https?://", pages[1])
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == 3  # contrasts, cells, corruptions
    assert "#01020" not in pages[1]


def test_markdown_shows_every_figure_of_the_page_as_a_file(helpful, tmp_path):
    markdown, page = report(tmp_path, helpful.config)
    shown = re.findall(r"!\[.+\]\((figures/.+\.svg)\)", markdown)
    assert len(shown) == Page(page).tags.count("svg") == 3
    assert sorted(shown) == sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "figures").iterdir())


def test_figures_are_drawings_in_fixed_colours_on_a_background(helpful, tmp_path):
    """GitHub, editors and packages show an SVG without the variables and the background of our page."""
    report(tmp_path, helpful.config)
    for path in (tmp_path / "figures").iterdir():
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].attrib["fill"] == "#fdfdfc"
        assert "var(" not in text
        assert "KD&amp;IG" in text
        assert text.count("\n") == 1


@pytest.mark.slow
def test_links_of_markdown_lead_to_figures_in_any_folder(helpful, tmp_path):
    write_report([helpful.config], tmp_path / "a" / "R.md", tmp_path / "R.html", figures=tmp_path / "b" / "c")
    links = re.findall(r"\((.+\.svg)\)", (tmp_path / "a" / "R.md").read_text())
    assert links[0] == "../b/c/primary-contrasts.svg"
    assert all((tmp_path / "a" / link).is_file() for link in links)


def test_committed_results_show_every_committed_figure():
    links = re.findall(r"\((results/figures/.+\.svg)\)", (RECIPES / "RESULTS.md").read_text(encoding="utf-8"))
    assert links
    assert sorted(RECIPES / link for link in links) == sorted((RECIPES / "results" / "figures").iterdir())


def test_study_without_rows_is_listed_with_its_command_after_those_that_were_run(pages):
    for text in pages:
        heading = next(found for found in ("# Not run yet\n", "<h2>Not run yet</h2>") if found in text)
        assert "60 runs planned." in text.partition(heading)[2]
        assert "59 of 60 planned" in text.partition(heading)[0]
        assert "accelerate launch recipes/study.py --config recipes/configs/study_waiting.yaml" in text


def test_missing_runs_and_provenance_are_listed(helpful, pages):
    for text in pages:
        assert "59 of 60 planned" in text
        assert "1 run: seed 11 of KD&amp;IG blank" in text or "1 run: seed 11 of KD&IG blank" in text
        for fact in ("one test machine", "abc1234", "torch 2.14", "weights t1"):
            assert fact in text


@pytest.mark.parametrize(
    ("commit", "told"), [("abc1234", "abc1234"), ("abc1234+", "abc1234+ (+: with changes not in the commit)")]
)
def test_changes_that_were_not_committed_are_explained(tmp_path, commit, told):
    results = helpful_study(tmp_path)
    edit_rows(tmp_path, lambda row: row.update(commit=commit))
    assert dict(facts(StudyResults.read(results.config)))["Commits"] == told


def test_maps_of_several_processors_are_counted(tmp_path):
    results = helpful_study(tmp_path / "primary")
    edit_rows(tmp_path / "primary", lambda row: row.update(maps_hash="m1" if int(row["seed"]) < 9 else "m2"))
    for text in report(tmp_path, results.config):
        assert "hash m1 in 45 runs, hash m2 in 15 runs" in text


def test_an_amended_plan_says_so_before_and_after_it_is_complete(tmp_path):
    config = primary_study(tmp_path / "rows", seeds=7, amended="on a day, for a reason.")
    for skip in ([("KD", 6)], []):
        add_rows(config, skip=skip)
        markdown = report(tmp_path, config)[0]
        assert "before its first run.**\n\nAmended since: on a day, for a reason." in markdown


def test_amendments_of_several_days_are_a_list(tmp_path):
    amended = "on 2026-01-02, blind, for a reason. It stays so on 2026-01-09.\n Again on 2026-01-03, for v1.5 on x86."
    config = primary_study(tmp_path / "rows", seeds=1, amended=amended)
    add_rows(config)
    markdown, page = report(tmp_path, config)
    first, second = "2026-01-02, blind, for a reason. It stays so on 2026-01-09.", "2026-01-03, for v1.5 on x86."
    assert f"before its first run.**\n\nAmended since:\n\n- {first}\n- {second}\n\n" in markdown
    assert f"<ul>\n<li>{first}</li>\n<li>{second}</li>\n</ul>" in page


def test_study_without_contrasts_claims_nothing(tmp_path):
    own = {"cells": {"KD": {"distill_loss_weight": 0.5}}, "contrasts": (), "purpose": "exploratory"}
    config = primary_study(tmp_path / "rows", seeds=3, **own)
    add_rows(config)
    for text in report(tmp_path, config):
        assert "No pre-specified contrast, so nothing is claimed." in text


def test_contrasts_are_shown_in_other_sets_of_seeds(tmp_path):
    config = primary_study(tmp_path / "rows", seeds=7, sensitivity={"but 6": list(range(6)), "only 3": [3]})
    add_rows(config, gains={ALIGNED: 0.5})
    table = sensitivity_table(StudyResults.read(config))
    assert table is not None
    assert list(table.columns) == ["all seeds", "but 6", "only 3"]
    assert len(table.rows) == 2 * 4
    name, (whole, part, one) = table.rows[0]
    assert name == "Clean accuracy: KD&IG aligned − KD"
    results = StudyResults.read(config)
    differences = results.differences("KD&IG aligned", "KD", "top1")
    test = scipy.stats.ttest_1samp(differences[:6], 0).confidence_interval(0.95)
    assert whole.main == signed(differences.mean())
    assert part == (signed(differences[:6].mean()), f"{span(test.low, test.high, sign=True)}; n 6")
    assert one == (signed(differences[3]), "no interval; n 1")
    assert "Sensitivity: other sets of seeds" in report(tmp_path, config)[0]


def test_spread_is_the_only_thing_that_is_told_of_a_blind_look(tmp_path, capsys):
    results = helpful_study(tmp_path / "primary")
    path = tmp_path / "study.yaml"
    given = {"cells": PRIMARY_CELLS, "base": {"drop": 5}, "contrasts": [list(pair) for pair in PRIMARY_CONTRASTS]}
    given |= {"name": "primary", "purpose": "primary", "dataset": "data/cifar10", "teacher": "mobilenetv2_cifar"}
    path.write_text(yaml.safe_dump(given | {"seeds": 12, "output_dir": str(tmp_path / "primary")}))
    assert main(["--spread", "top1", str(path)]) == 0
    variances = [np.var(results.differences(a, b, "top1"), ddof=1) for a, b in PRIMARY_CONTRASTS]
    assert capsys.readouterr().out == f"primary: sd {np.sqrt(np.mean(variances)):.4f}, top1\n"
    assert main(["--spread", "corruption_top1", str(path)]) == 2
    assert "a primary study's blind look is at top1 alone" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--spread", "top1"]])
def test_a_missing_package_of_the_report_is_one_line(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("studies.find_spec", lambda name: None if name == "scipy" else object())
    assert main([*flags, str(tmp_path / "study.yaml")]) == 2
    assert "the study's report needs scipy; install it with: pip install 'timm-igkd[study]'" in capsys.readouterr().err


def test_spread_of_an_unfinished_study_is_refused(tmp_path):
    waiting = helpful_study(tmp_path, skip=[("KD&IG blank", 11)])
    with pytest.raises(InputError, match="1 of 60 runs are missing; the spread is of all of them"):
        waiting.spread("top1")


def test_equal_rows_give_equal_files(helpful, pages, tmp_path):
    waiting = primary_study(tmp_path / "none", name="waiting", title="Waiting", purpose="exploratory")
    again = report(tmp_path, helpful.config, waiting)
    assert again[1] == pages[1]
    assert again[0] == pages[0]


@pytest.mark.slow
def test_order_of_rows_changes_nothing(tmp_path):
    config = primary_study(tmp_path, seeds=3)
    add_rows(config, measured=False)
    first = report(tmp_path, config)
    path = tmp_path / "results.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert report(tmp_path, config) == first


def test_names_are_text_never_markup(tmp_path):
    hostile = "<script>alert(1)</script> | x"
    config = primary_study(tmp_path, seeds=2, title=hostile, cells=PRIMARY_CELLS | {hostile: {}})
    add_rows(config, measured=False)
    markdown, page = report(tmp_path, config)
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "| <script>alert(1)</script> \\| x |" in markdown


def test_one_seed_has_a_page_without_intervals(tmp_path):
    config = primary_study(tmp_path, seeds=1)
    add_rows(config)
    markdown, _ = report(tmp_path, config)
    assert "too few runs" in markdown
    assert "nan" not in markdown.lower().replace("provenance", "")


def test_metrics_that_were_not_measured_have_no_column(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config, measured=False)
    results = StudyResults.read(config)
    assert not {"Corrupted, %", "IG similarity"} & set(cells_table(results).columns)
    assert corruption_table(results) is None
    assert contrast_table(results, "corruption_top1") is None
    assert corruptions(results, "x") is None


def test_quantile_plots_start_at_twenty_seeds(tmp_path):
    config = primary_study(tmp_path, seeds=20)
    add_rows(config, measured=False)
    assert "Shapiro-Wilk" in quantiles(StudyResults.read(config), "x")[0]
    assert quantiles(StudyResults.read(primary_study(tmp_path, seeds=19)), "x") is None


def test_compression_figure_shows_arms_of_several_sizes(tmp_path, helpful):
    cells = {"Student": {"grid": {"drop": [5, 9]}}, "KD&IG": KD | IG | {"grid": {"drop": [5, 9]}}}
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    draw = dict(FIGURES)["Accuracy against compression"]
    svg, words = draw(StudyResults.read(config), "x")
    assert "KD&amp;IG − Student" in svg
    assert "KD&amp;IG, paper" in svg
    assert "12×" in svg
    assert "the paper's means" in words
    assert draw(helpful, "x") is None


def test_compression_figure_tells_arms_of_other_overlays_apart(tmp_path):
    shuffled = IG | {"overlay_source": "shuffled"}
    arms = {"own": KD | IG, "foreign": KD | shuffled, "twice": KD | shuffled | {"overlay_prob": 0.2}}
    cells = {f"{arm} {drop}": settings | {"drop": drop} for arm, settings in arms.items() for drop in (5, 9)}
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    svg, _ = dict(FIGURES)["Accuracy against compression"](StudyResults.read(config), "x")
    for name in ("KD&amp;IG", "foreign 5", "twice 5"):
        assert f">{name}<" in svg


def test_compression_figure_keeps_an_arm_that_is_called_like_another(tmp_path):
    cells = {f"own {drop}": KD | IG | {"drop": drop} for drop in (5, 9)}
    cells["KD&IG"] = KD | IG | {"overlay_prob": 0.2, "drop": 5}
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    assert _arms(StudyResults.read(config)) == {"own 5": ["own 5", "own 9"], "KD&IG": ["KD&IG"]}


def test_compression_figure_pairs_arms_by_their_student(tmp_path, monkeypatch):
    students = {"deep": {"base": "test_resnet", "drop": 1}, "flat": {"base": "test_resnet", "drop": 2}}
    cells = {
        f"{arm}, drop {size}": settings | {"student": "igkd_truncated", "student_args": students[size]}
        for arm, settings in {"Student": {}, "KD": KD}.items()
        for size in students
    }
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    compared = []
    results = StudyResults.read(config)
    monkeypatch.setattr(type(results), "compare", lambda self, a, b, column: compared.append((a, b)) or Comparison(0))
    assert dict(FIGURES)["Accuracy against compression"](results, "x") is not None
    assert sorted(compared) == [("KD, drop deep", "Student, drop deep"), ("KD, drop flat", "Student, drop flat")]


def test_command_writes_the_report_of_yaml_files(tmp_path, capsys):
    settings = {"name": "one", "cells": {"Student": {"student": "test_resnet"}}, "seeds": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "out")}))
    files = [str(tmp_path / "a.md"), str(tmp_path / "a.html")]
    assert main([str(tmp_path / "one.yaml"), "--markdown", files[0], "--html", files[1]]) == 0
    assert f"--config {tmp_path / 'one.yaml'}" in (tmp_path / "a.md").read_text()
    assert main([str(tmp_path / "two.yaml"), "--markdown", files[0], "--html", files[1]]) == 2
    assert "two.yaml" in capsys.readouterr().err


def test_two_studies_of_one_name_are_refused(helpful, tmp_path):
    with pytest.raises(InputError, match="each once"):
        report(tmp_path, helpful.config, helpful.config)


def test_rows_of_the_tests_are_those_of_the_study(helpful):
    assert StudyRows(helpful.config.output_dir).run_keys() == {
        (helpful.config.run_hash(cell), seed)
        for name, cell in helpful.config.cells.items()
        for seed in helpful.config.seed_range
        if (name, seed) != ("KD&IG blank", 11)
    }
