"""The documentation: the site builds strictly, the tour runs from top to bottom, numbers are those of the results."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import timm_igkd
from timm_igkd.runs.protocols import PRESETS

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"


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


def test_numbers_on_the_studies_page_are_those_of_the_results():
    page, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/studies.md", "recipes/RESULTS.md"))
    numbers = re.findall(r"[+−]\d+\.\d+ \([+−]\d+\.\d+ to [+−]\d+\.\d+\)", page)
    assert len(numbers) > 12
    assert [number for number in numbers if number not in results] == []


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
