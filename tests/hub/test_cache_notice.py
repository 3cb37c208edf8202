"""A copy in the cache that is used because the Hub refuses or is silent is named in one line, over real HTTP."""

import contextlib
import re
import subprocess
import sys

import pytest
from fixture_parts import HUB_TOKEN
from hub_parts import build_maps
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from timm_igkd import MapStore, push_maps
from timm_igkd.errors import RunError
from timm_igkd.hub.cache_notice import cache_use_is_told

pytestmark = [
    pytest.mark.hub,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]
MAPS, IMAGES = "user/maps", "user/images"
FAILURES = {
    "401": r"status 401",
    "403": r"status 403",
    "404": r"status 404 \(RepoNotFound\)",
    "503": r"status 503",
    "down": r"no answer",
}


def break_hub(hub, failure, monkeypatch):
    if failure == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.endpoint, "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    elif failure in ("403", "503"):
        for method in ("GET", "HEAD"):
            hub.fault(failure, method, ".", times=1000)
    elif failure == "401":
        hub.tokens.clear()
    else:
        hub.tokens = dict.fromkeys(hub.tokens, "stranger")
        for repo in hub.repos.values():
            repo.private = True


def the_line(capfd):
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def maps(hub, tmp_path):
    push_maps(build_maps(tmp_path / "maps").path, MAPS)
    return MapStore(MAPS)


@pytest.mark.parametrize("failure", FAILURES)
def test_maps_from_the_cache_are_told(failure, hub, maps, monkeypatch, capfd):
    break_hub(hub, failure, monkeypatch)
    capfd.readouterr()
    assert MapStore(MAPS).rows["key"] == maps.rows["key"]
    line = the_line(capfd)
    asked = f"warning: the Hub's dataset '{MAPS}' was asked for at the Hub"
    assert re.fullmatch(f"{asked}, {FAILURES[failure]}; the copy in the cache is used", line)
    assert HUB_TOKEN not in line


def test_maps_that_the_hub_confirms_are_not_spoken_of(hub, maps, capfd):
    capfd.readouterr()
    MapStore(MAPS)
    assert capfd.readouterr().err == ""


def test_other_hosts_are_not_the_hub(hub, capfd):
    """The viewer of data sets may fail without any effect."""
    with cache_use_is_told("x"), contextlib.suppress(Exception):
        get_session().get(f"http://localhost:{hub.port}/info")
    assert capfd.readouterr().err == ""
    hub.problems.clear()


LOAD = f"""
from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd import load_labeled_images
raise SystemExit(run_reporting_errors(lambda: print(len(load_labeled_images("{IMAGES}", "train"))), "timm-igkd"))
"""


@pytest.mark.slow
def test_data_set_from_the_cache_is_told(hub, tmp_path, tiny_images, monkeypatch):
    folder = tiny_images(n=2)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    hub.add(IMAGES, "datasets").commit(files)
    found = []
    for broken in (False, True):
        if broken:
            break_hub(hub, "401", monkeypatch)
        command, env = [sys.executable, "-W", "ignore", "-c", LOAD], hub.environment(tmp_path / "home", HUB_TOKEN)
        found.append(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300))
    assert (found[0].returncode, found[0].stdout, found[0].stderr) == (0, "2\n", "")
    assert (found[1].returncode, found[1].stdout) == (0, "2\n"), found[1].stderr
    (line,) = found[1].stderr.strip().splitlines()
    assert re.search(f"dataset '{IMAGES}' was asked for .* status 401; the copy in the cache", line)


def test_a_newer_commit_that_breaks_off_leaves_the_cached_maps_in_use(hub, store, tmp_path, monkeypatch):
    other_store = build_maps(tmp_path / "other", seed=4)
    push_maps(store.path, MAPS)
    MapStore(MAPS)
    push_maps(other_store.path, MAPS)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fault = hub.fault("cut", "GET", "/storage/", times=10_000)
    with pytest.raises(RunError):
        MapStore(MAPS)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert MapStore(MAPS).rows["row_hash"] == store.rows["row_hash"]
    fault.times = 0
    assert MapStore(MAPS).rows["row_hash"] == other_store.rows["row_hash"]
