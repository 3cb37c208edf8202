import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import timm_igkd
from timm_igkd.version import __version__

ROOT = Path(__file__).resolve().parents[1]


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
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "timm_igkd/version.py"
    assert timm_igkd.__version__ == __version__


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
    assert "timm-igkd = timm_igkd.cli.main:entry" in wheel.read(f"{folder}/entry_points.txt").decode()
