import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from test_rooms import FLOORS

import timm_igkd
from timm_igkd.version import __version__

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/timm-igkd/timm-igkd"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_version_is_written_once(project):
    assert project["project"]["dynamic"] == ["readme", "version"]
    assert project["tool"]["hatch"]["version"]["path"] == "timm_igkd/version.py"
    assert timm_igkd.__version__ == __version__


def test_page_of_the_package_leads_to_the_repository(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    page = wheel.read(name).decode().partition("\n\n")[2]
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert f"{REPOSITORY}/raw/main/recipes/results/overlay.png" in targets
    assert f"{REPOSITORY}/blob/main/docs/index.md" in targets
    assert all(target.startswith(("https://", "#")) for target in targets)


def test_nothing_is_pinned(project):
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    pinned = [
        requirement for group in groups for requirement in group if set("=<~!") & set(requirement.replace(">=", ""))
    ]
    assert pinned == []


def test_console_script_exists(project):
    module, _, function = project["project"]["scripts"]["timm-igkd"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_changelog_names_the_open_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("## [Unreleased]") or line.startswith(f"## [{__version__}]") for line in lines)


def test_urls_name_one_repository(project):
    urls = [url for url in project["project"]["urls"].values() if "github.com" in url]
    urls.append(read_yaml("CITATION.cff")["repository-code"])
    urls += [link["url"] for link in read_yaml(".github/ISSUE_TEMPLATE/config.yml")["contact_links"]]
    assert {"/".join(url.split("/")[:5]) for url in urls} == {REPOSITORY}


def test_citation_is_that_of_this_version(project):
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["version"] == __version__
    assert citation["license"] == project["project"]["license"]
    (paper,) = citation["references"]
    assert paper["url"] == project["project"]["urls"]["Paper"]
    assert paper["title"] in (ROOT / "hub" / "templates" / "citations.bib").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_forms_ask_something_with_an_id(name):
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_workflow_of_tests_runs_the_makefiles_targets():
    jobs = read_yaml(".github/workflows/tests.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make test PYTHON=python", "make test-slow PYTHON=python"]
    targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {command.split()[1] for command in commands} <= set(targets)


def test_oldest_python_that_is_tested_is_the_oldest_that_is_allowed(project):
    tested = read_yaml(".github/workflows/tests.yml")["jobs"]["fast"]["strategy"]["matrix"]["python"]
    assert project["project"]["requires-python"] == f">={tested[0]}"
    named = [name.rpartition(" ")[2] for name in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert (tested[0], tested[-1]) == (named[0], named[-1])


def test_release_is_published_by_trust_and_not_by_a_secret():
    path = ".github/workflows/release.yml"
    workflow = read_yaml(path)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert not re.search(r"secrets\.|password", (ROOT / path).read_text(encoding="utf-8"))


def test_files_named_in_the_architecture_exist():
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|/))`", ARCHITECTURE)
    assert len(named) > 40
    folders = (ROOT, ROOT / "timm_igkd")
    assert {name for name in named if not any((folder / name).exists() for folder in folders)} == set()


def test_names_in_the_architecture_are_those_of_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "timm_igkd").rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    named = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)`", ARCHITECTURE)
    assert len(named) > 20
    assert {
        name for name in named if not name.endswith((".py", ".md", ".json")) and name.split(".")[-1] not in words
    } == set()


def test_rooms_of_the_architecture_are_those_of_the_house():
    rooms = re.findall(r"(?m)^\| `(\w+)/` \|", ARCHITECTURE)
    assert rooms == [room for floor in FLOORS for room in floor if room]


def test_links_between_the_documents_lead_somewhere():
    """From docs/ to the rest of the repository they are whole addresses, which work on the site, too."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.[mi][dp]*")):
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        own = re.findall(rf"\]\({re.escape(REPOSITORY)}/blob/main/([^)#]+)", text)
        assert [link for link in links if not (path.parent / link).exists()] == [], path.name
        assert [link for link in own if not (ROOT / link).exists()] == [], path.name
        if path.parent.name == "docs":
            assert [link for link in links if link.startswith("..")] == [], path.name


def test_files_that_the_documents_name_are_there():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        named = re.findall(
            r"`((?:tests|benchmarks|recipes|docs|hub|timm_igkd)/[\w./-]+)`", path.read_text(encoding="utf-8")
        )
        places = (ROOT, ROOT / "timm_igkd")  # the architecture names rooms without the package
        assert [name for name in named if not any((place / name).exists() for place in places)] == [], path.name


@pytest.mark.slow
def test_wheel_holds_only_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"timm_igkd", f"timm_igkd-{__version__}.dist-info"}


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_the_templates(wheel):
    names = set(wheel.namelist())
    package = [path for path in (ROOT / "timm_igkd").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    templates = [path for path in (ROOT / "hub" / "templates").rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"timm_igkd/templates/{path.relative_to(ROOT / 'hub' / 'templates').as_posix()}" for path in templates}
    assert expected <= names


@pytest.mark.slow
def test_wheel_names_its_license_and_script(wheel):
    folder = f"timm_igkd-{__version__}.dist-info"
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{folder}/METADATA").decode()
    assert "timm-igkd = timm_igkd.__main__:entry" in wheel.read(f"{folder}/entry_points.txt").decode()
