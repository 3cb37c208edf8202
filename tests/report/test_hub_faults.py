"""Pushing and loading while the network or the server fails: asked again, or one line and nothing published."""

import logging
import time
from pathlib import Path

import pytest
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, make_run, one_error_line, plain_student
from huggingface_hub import HfApi
from huggingface_hub.utils import _http, get_session
from student_push_parts import REPO, published, push

from timm_igkd import load_model, push_student
from timm_igkd.errors import RunError
from timm_igkd.hub import errors as hub_errors
from timm_igkd.models.loading import weights_hash
from timm_igkd.report.push import verify_published

pytestmark = HUB_MARKS


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("GET", "/api/models/user/student$"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/commit/main"),
        ("HEAD", "/resolve/.*/config.json"),
    ],
)
def test_server_that_answers_503_twice_is_asked_again(hub, plain_run, method, path):
    hub.fault("503", method, path, times=2)
    push_student(plain_run, REPO)
    assert hub.faults[0].times == 0
    assert len(hub.repo(REPO).commits) == 2


@pytest.mark.parametrize("path", ["/preupload/main", "/objects/batch", "/storage/"])
def test_upload_that_meets_503_twice_succeeds(hub, plain_run, path, monkeypatch):
    quick_client(monkeypatch)
    hub.fault("503", "PUT" if path == "/storage/" else "POST", path, times=2)
    push_student(plain_run, REPO)
    assert hub.faults[0].times == 0
    assert len(hub.repo(REPO).commits) == 2


def quick_client(monkeypatch):
    """Take the waits out of huggingface_hub's own retries."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def test_cut_upload_is_made_again(hub, plain_run, monkeypatch):
    quick_client(monkeypatch)
    hub.fault("cut", "PUT", "/storage/", times=2)
    push_student(plain_run, REPO)
    assert hub.faults[0].times == 0
    assert len(hub.repo(REPO).commits) == 2


def test_upload_that_is_always_cut_is_one_line_and_publishes_nothing(hub, plain_run, another, capfd, monkeypatch):
    quick_client(monkeypatch)
    push_student(plain_run, REPO)
    before = hub.repo(REPO).head
    hub.fault("cut", "PUT", "/storage/", times=1000)
    assert push(another) == 1
    assert "the connection to the Hub broke" in one_error_line(capfd)
    assert hub.repo(REPO).head == before


def test_lost_answer_of_a_commit_ends_in_one_commit(hub, plain_run):
    hub.fault("lost", "POST", "/commit/main")
    pushed = push_student(plain_run, REPO)
    assert hub.count("POST", "/commit/main") == 1
    assert len(hub.repo(REPO).commits) == 2
    assert pushed.commit == hub.repo(REPO).head


def test_stalled_commit_is_made_again_after_the_time_out(hub, plain_run):
    hub.fault("stall", "POST", "/commit/main", seconds=20)
    push_student(plain_run, REPO, timeout_s=0.5)
    assert hub.count("POST", "/commit/main") == 2
    assert len(hub.repo(REPO).commits) == 2


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/user/student$"), ("PUT", "/storage/")])
def test_stall_anywhere_is_asked_again_after_the_time_out(hub, plain_run, monkeypatch, method, path):
    quick_client(monkeypatch)
    fault = hub.fault("stall", method, path, seconds=20)
    begun = time.monotonic()
    push_student(plain_run, REPO, timeout_s=0.5)
    assert fault.times == 0
    assert len(hub.repo(REPO).commits) == 2
    assert time.monotonic() - begun < 20


def test_server_that_always_stalls_is_one_line(hub, plain_run, capfd):
    hub.fault("stall", "POST", "/commit/main", times=1000, seconds=20)
    assert push(plain_run, "--timeout", "0.3") == 1
    assert "gave no answer" in one_error_line(capfd)
    assert set(published(hub)) == {".gitattributes"}


def test_server_that_always_answers_503_is_one_line(hub, plain_run, capfd):
    hub.fault("503", "POST", "/commit/main", times=1000)
    assert push(plain_run) == 1
    assert "in trouble (status 503)" in one_error_line(capfd)
    assert set(published(hub)) == {".gitattributes"}


def test_student_loads_although_its_download_is_cut_twice(hub, plain_run, monkeypatch):
    quick_client(monkeypatch)
    push_student(plain_run, REPO)
    fault = hub.fault("cut", "GET", "/storage/", times=2)
    assert weights_hash(load_model(f"hf-hub:{REPO}")) == weights_hash(load_model(f"local-dir:{plain_run / 'student'}"))
    assert fault.times == 0


@pytest.mark.parametrize(("method", "path"), [("GET", "config.json"), ("HEAD", "config.json"), ("GET", "/storage/")])
def test_server_in_trouble_is_one_line_when_loading(hub, plain_run, monkeypatch, method, path):
    quick_client(monkeypatch)
    push_student(plain_run, REPO)
    hub.fault("503", method, path, times=1000)
    with pytest.raises(RunError, match=f"'hf-hub:{REPO}'") as raised:
        load_model(f"hf-hub:{REPO}")
    assert len(str(raised.value).splitlines()) == 1
    assert HUB_TOKEN not in str(raised.value)


def test_commit_on_a_branch_that_moved_is_prepared_again(hub, plain_run, monkeypatch):
    push_student(plain_run, REPO)
    (edited := dict(published(hub)))["README.md"] = b"---\nlicense: mit\n---\nwritten by hand meanwhile\n"
    real, calls = hub_errors.is_passing, []
    monkeypatch.setattr(hub_errors, "is_passing", lambda error: calls.append(error) or real(error))
    create_commit = HfApi.create_commit

    def commit_after_an_edit(self, *args, **kwargs):
        if not calls:
            hub.repo(REPO).commit(edited)
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", commit_after_an_edit)
    other = make_run(Path(plain_run).parent / "meanwhile", plain_student(seed=5))
    pushed = push_student(other, REPO)
    assert [error.response.status_code for error in calls] == [412]
    assert pushed.card_kept
    assert published(hub)["README.md"] == edited["README.md"]


def test_download_that_differs_from_what_was_pushed_is_an_error(hub, plain_run, capfd):
    hub.fault("corrupt", "GET", "/storage/")
    assert push(plain_run) == 1
    line = one_error_line(capfd)
    assert "does not come back from the Hub as it is here: the weights differ" in line


def test_outputs_and_preprocessing_are_compared_as_well_as_weights(hub, plain_run):
    pushed = push_student(plain_run, REPO)
    here = load_model(f"local-dir:{Path(plain_run) / 'student'}").eval()
    verify_published(here, pushed)
    here.bn1.eps = 0.5
    with pytest.raises(RunError, match="outputs differ"):
        verify_published(here, pushed)
    here = load_model(f"local-dir:{Path(plain_run) / 'student'}").eval()
    here.pretrained_cfg = {**here.pretrained_cfg, "mean": (0.1, 0.1, 0.1)}
    with pytest.raises(RunError, match="mean of the preprocessing"):
        verify_published(here, pushed)


def test_push_leaves_the_client_as_it_was(hub, plain_run, caplog):
    caplog.set_level("WARNING", "huggingface_hub")
    push_student(plain_run, REPO)
    assert get_session().timeout.read is None
    assert logging.getLogger("huggingface_hub").level == logging.WARNING
