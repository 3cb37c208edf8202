"""The documentation: the site builds strictly, the tour runs from top to bottom, numbers are those of the results."""

import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import dropwhile, takewhile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import timm_igkd
from studies.config import load_study
from studies.contrast import Contrast
from studies.results import StudyResults
from studies.tables import probability, signed, span
from timm_igkd.runs.protocols import PRESETS

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
README, STUDIES = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/studies.md"))
OVERLAY = ("KD&IG aligned", "KD")
TABLED_SHARES = {"a tenth of the images": "cpu", "half of them": "cpu_maps"}
CONTROLS = {
    "other images' maps (shuffled)": "shuffled",
    "their own, pixels permuted": "permuted",
    "noise": "noise",
    "a blank map": "blank",
    "Sobel edges": "sobel",
    "an untrained network's maps": "random teacher",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site from a copy, which keeps the repository as it is."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("docs", "timm_igkd", ".zensical"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".zensical.toml", root)
    command = [sys.executable, "-m", "zensical", "build", "--config-file", ".zensical.toml", "--strict"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe" not in done.stdout + done.stderr  # strict does not count what the docstrings' reader says
    return root / "build" / "site"


@pytest.mark.slow
def test_site_has_every_page_and_every_public_name(site: Path):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    menu = (site / "404.html").read_text(encoding="utf-8")  # a page without links of its own
    assert [page for page in pages if f"{page}.html" not in menu] == []
    api = (site / "api.html").read_text(encoding="utf-8")
    named = [name for name in timm_igkd.__all__ if name != "__version__"]
    assert [name for name in named if f'id="timm_igkd.{name}"' not in api] == []
    assert "share of training images overlaid with their map" in api  # a setting's text, of settings_table.py


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site: Path):
    for page in site.glob("*.html"):
        tags = re.findall(r"<(?:script|img|link)\b[^>]*>", page.read_text(encoding="utf-8"))
        loaded = [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
        assert [tag for tag in loaded if "canonical" not in tag] == [], page.name


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, its own head first, without the line of dashes."""
    below = text.partition(f"## {heading}\n")[2].splitlines()
    lines = list(takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), below)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


@cache
def results_of(name: str) -> StudyResults:
    config = ROOT / "recipes" / "configs" / f"study_{name}.yaml"
    return StudyResults.read(load_study(config, f"--output_dir={ROOT / 'recipes' / 'results' / f'study_{name}'}"))


def contrast_of(study: str, a: str, b: str, column: str = "top1") -> Contrast:
    (found,) = [one for one in results_of(study).contrasts(column) if (one.a, one.b) == (a, b)]
    return found


def written(contrast: Contrast) -> str:
    found = contrast.comparison
    return f"{signed(found.difference)} ({span(found.low, found.high, sign=True)})"


def test_effect_of_overlays_on_the_studies_page_is_that_of_the_rows():
    contrasts = {
        "a tenth of the images": ("cpu", *OVERLAY),
        "half of them": ("cpu_maps", *OVERLAY),
        "a tenth, another teacher (ResNet-10-T)": ("cpu_pair", *OVERLAY),
        "a tenth, over 20 subsets of 80 %": ("cpu_monte_carlo", "KD&IG", "KD"),
    }
    expected = [["overlaid", "seeds", "points", "Holm p"]]
    for label, contrast in contrasts.items():
        found = contrast_of(*contrast)
        expected.append([label, str(found.comparison.n), written(found), probability(found.holm_p)])
    assert table_rows(STUDIES, "At CPU scale") == expected


def test_controls_on_the_studies_page_are_those_of_the_rows():
    """Holm's p stands where the interval by itself would show a difference that the correction does not."""
    columns = [(share, results_of(study).contrasts("top1")) for share, study in TABLED_SHARES.items()]
    expected = [["aligned maps minus", *(f"{share}, n = {found[0].comparison.n}" for share, found in columns)]]
    for label, control in CONTROLS.items():
        cells = {share: "" for share, _ in columns}
        for share, contrasts in columns:
            for contrast in contrasts:
                if contrast.b == f"KD&IG {control}":
                    assert contrast.comparison.n == contrasts[0].comparison.n
                    is_hidden = contrast.comparison.p < 0.05 <= contrast.holm_p
                    note = f", Holm p {probability(contrast.holm_p)}" if is_hidden else ""
                    cells[share] = written(contrast) + note
        expected.append([label, *cells.values()])
    assert table_rows(STUDIES, "At CPU scale: does it matter whether the map belongs to the image?") == expected


def test_weights_of_kd_on_the_studies_page_are_those_of_the_rows():
    cells = {
        "none": ("real_recipe", "Student, lr 0.2"),
        "0.01, 2.5 (the paper's)": ("real_kd", "KD weight 0.01 T 2.5"),
        "0.5, 4": ("real_kd", "KD weight 0.5 T 4"),
        "0.9, 4": ("real_kd", "KD weight 0.9 T 4"),
    }
    expected = [
        [label, f"{results_of(study).summary(cell, 'top1').mean:.2f} %"] for label, (study, cell) in cells.items()
    ]
    assert table_rows(STUDIES, "How much should the teacher count?")[1:] == expected


def test_numbers_between_the_tables_of_the_studies_page_are_those_of_the_rows():
    tenth, half = (contrast_of(study, *OVERLAY, "corruption_top1") for study in ("cpu", "cpu_maps"))
    foreign = contrast_of("cpu_pair", "KD&IG aligned", "KD&IG shuffled")
    permuted = contrast_of("cpu_pair", "KD&IG aligned", "KD&IG permuted", "corruption_top1")
    alone = [contrast_of("real_arms", "IG", "Student", column) for column in ("top1", "corruption_top1")]
    taught = contrast_of("real_arms", "KD", "Student")
    sentences = [
        f"n = {taught.comparison.n} seeds) it is alike: ",
        f"overlays minus none {written(alone[0])} points of clean accuracy and",
        f"and {written(alone[1])} under corruption; ",
        f"KD minus none gives {written(taught)}.",
        f"Accuracy under corruption: {written(tenth)} at a tenth of the images, where no difference is shown; ",
        f"; {written(half)} at half of them",
        f"is shown: {written(foreign)} over shuffled maps, n = {foreign.comparison.n}.",
        f"aligned minus permuted maps {written(permuted)}, Holm p {probability(permuted.holm_p)}.",
    ]
    prose = " ".join(line.strip() for line in STUDIES.splitlines() if not line.startswith("|"))
    assert [sentence for sentence in sentences if sentence not in prose] == []
    assert len(re.findall(r"[+−]\d+\.\d+ \(", prose)) == len(sentences) - 1  # but for the one of n
    of_pair = [one for column in ("top1", "corruption_top1") for one in results_of("cpu_pair").contrasts(column)]
    shown = [(one.name, written(one)) for one in of_pair if one.is_significant]
    assert shown == [(permuted.name, written(permuted))]  # "the only difference that its study shows"


@pytest.mark.parametrize("page", ["README.md", "docs/studies.md"])
def test_table_of_the_primary_study_is_that_of_its_rows(page):
    """All differences are shown but those that are equivalent, within the bound that the text says."""
    controls = {
        "KD alone": "KD",
        "KD, other images' maps": "KD&IG shuffled",
        "KD, their own maps with pixels permuted": "KD&IG permuted",
        "KD, black overlays": "KD&IG blank",
    }
    expected = [["KD with aligned overlays minus …, in points", "clean accuracy", "under 40 corruptions"]]
    for label, control in controls.items():
        clean, corrupted = (contrast_of("real", OVERLAY[0], control, column) for column in ("top1", "corruption_top1"))
        assert clean.comparison.n == corrupted.comparison.n == 24
        assert clean.is_significant is not clean.is_equivalent
        assert corrupted.is_significant
        expected.append([label, written(clean) + ", equivalent" * clean.is_equivalent, written(corrupted)])
    assert table_rows((ROOT / page).read_text(encoding="utf-8"), "Does the overlay help?") == expected
    assert results_of("real").config.smallest_effect["top1"] == 0.2


def test_price_of_the_overlay_is_told_as_the_rows_have_it():
    found = contrast_of("real", *OVERLAY).comparison
    low, high = (f"{-end:.2f}" for end in (found.high, found.low))
    told = f"{-found.difference:.2f} points"
    pages = [
        README,
        *((ROOT / name).read_text(encoding="utf-8") for name in ("docs/distill.md", "timm_igkd/runs/protocols.py")),
    ]
    for text in pages:
        assert re.search(rf"{told}[\w ]* \({low} to {high}", " ".join(text.split()).replace(", by ", " "))
    black = contrast_of("real", OVERLAY[0], "KD&IG blank").comparison
    assert f"a black overlay costs {-black.difference:.2f} points less" in " ".join(STUDIES.split())


def test_other_sets_of_seeds_answer_the_first_question_alike():
    results = results_of("real")
    for seeds in results.config.sensitivity.values():
        for column, sign in (("top1", -1), ("corruption_top1", 1)):
            runs = [{s: v for s, v in results.values(cell, column).items() if s in seeds} for cell in OVERLAY]
            found = results.compare_runs(*OVERLAY, *runs)
            assert min(sign * found.low, sign * found.high) > 0


def test_every_overlay_is_below_none_and_two_of_four_differences_are_shown():
    contrasts = []
    for study in ("cpu", "cpu_maps", "cpu_pair", "cpu_monte_carlo"):
        results = results_of(study)
        means = {name: results.summary(name, "top1").mean for name in results.cells}
        overlaid = [name for name in means if results.cell(name).overlay_prob > 0]
        assert [name for name in overlaid if means[name] >= means["KD"]] == []
        contrasts += [one for one in results.contrasts("top1") if one.a in overlaid and one.b == "KD"]
    assert [one.is_significant for one in contrasts] == [True, True, False, False]
    for text in (README, STUDIES, (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")):
        assert "clean accuracy with every overlay was below that without" in " ".join(text.split())


def test_benchmarks_write_the_files_that_stand_beside_their_commands():
    found = 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        files: list[str] = []
        for line in page.read_text(encoding="utf-8").splitlines():
            files = re.findall(r"`(benchmarks/results/[\w.]+)`", line) or files  # "same file": of the row above
            for command in re.findall(r"`python (benchmarks/[^`]+)`", line):
                script, *words = command.split()
                source = (ROOT / script).read_text(encoding="utf-8").replace("{device}", "cpu")
                named = words[words.index("--out") + 1] if "--out" in words else None
                assert named in files if named else any(Path(file).name in source for file in files), command
                found += 1
    assert found > 15


def test_table_of_protocols_is_that_of_the_code():
    lines = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    head, *rows = cells
    names = [re.findall(r"`(\w+)`", cell)[0] for cell in head[1:]]
    assert set(names) == set(PRESETS)
    table = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
    for name, preset in PRESETS.items():
        assert table["epochs, batch size"][name] == f"{preset['epochs']}, {preset['batch_size']}"
        assert table["KD weight, temperature"][name] == f"{preset['distill_loss_weight']}, {preset['temperature']:g}"
        optimiser, rate, schedule = table["optimiser, learning rate"][name].split(", ")
        assert (optimiser.lower(), float(rate)) == (preset["opt"], preset["lr"])
        assert schedule.replace("constant", "none") == preset["sched"]
        assert table["student starts"][name].startswith(preset["student_init"])
        assert table["overlay"][name].startswith("a tenth" if preset["overlay_prob"] == 0.1 else "none")
        assert ("without overlay" in table["teacher sees"][name]) == (preset["teacher_view"] == "clean")
        assert ("RandomResizedCrop" in table["crop"][name]) == (preset["train_crop"] == "rrc")


def test_tour_is_committed_with_outputs_and_without_noise():
    text, tour = TOUR.read_text(encoding="utf-8"), nbformat.read(TOUR, as_version=4)
    assert len(text) < 1_000_000
    outputs = [output for cell in tour.cells for output in cell.get("outputs", ())]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 5
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not re.search(r"/tmp/|/home/|/root/|site-packages|Warning", text)


@pytest.mark.slow
def test_tour_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPLBACKEND")  # the notebook shows its figures itself
    tour = nbformat.read(TOUR, as_version=4)
    NotebookClient(tour, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in tour.cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert list(tmp_path.iterdir()) == []
