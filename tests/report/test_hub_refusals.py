"""What is not pushed or not loaded: one line, nothing published, no token anywhere."""

import pytest
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, make_run, one_error_line, plain_student
from huggingface_hub import constants
from student_push_parts import REPO, published, push

from timm_igkd import push_student
from timm_igkd.cli.main import main
from timm_igkd.errors import MissingFileError

pytestmark = HUB_MARKS


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_" + "nobody" * 6, REPO, "refused the token"),
        (None, REPO, "no Hugging Face login"),
        (HUB_TOKEN, "other/student", "may not write"),
    ],
)
def test_no_access_is_one_line(hub, plain_run, capfd, monkeypatch, token, repo, said):
    hub.add("other/student")
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push(plain_run, repo=repo) == 1
    line = one_error_line(capfd)
    assert said in line
    assert not token or token not in line
    assert list(hub.repos) == [("models", "other/student")]
    assert len(hub.repo("other/student").commits) == 1


def test_missing_namespace_is_one_line(hub, plain_run, capfd):
    assert push(plain_run, repo="someone/student") == 1
    assert "may not write" in one_error_line(capfd)
    assert hub.repos == {}


def test_name_taken_by_another_model_is_one_line(hub, plain_run, capfd):
    hub.add(REPO).commit({"config.json": b'{"model_type": "bert"}', "model.safetensors": b"bert"})
    before = hub.repo(REPO).head
    assert push(plain_run) == 1
    assert "holds something else already ('config.json')" in one_error_line(capfd)
    assert hub.repo(REPO).head == before


def test_gated_student_is_one_line(hub, plain_run, capfd, tiny_images, tmp_path):
    push_student(plain_run, REPO)
    hub.repo(REPO).gated = True
    hub.tokens["hf_" + "stranger" * 5] = "stranger"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_" + "stranger" * 5)
        arguments = ["--dataset", str(tiny_images(n=2)), "--split", "train", "--out", str(tmp_path / "metrics.json")]
        assert main(["evaluate", "--model", f"hf-hub:{REPO}", *arguments]) == 1
    assert "is gated" in one_error_line(capfd)


@pytest.mark.parametrize("repo", ["student", "user/", "user/a/b", "user/stu dent", "../x"])
def test_bad_name_is_one_line(hub, plain_run, capfd, repo):
    assert push(plain_run, repo=repo) == 2
    assert "--repo-id must be user/name" in one_error_line(capfd)
    assert hub.requests == []


def test_folder_without_a_student_is_one_line(hub, tmp_path, capfd):
    assert push(tmp_path) == 2
    assert "holds neither student/config.json" in one_error_line(capfd)
    with pytest.raises(MissingFileError, match="no folder"):
        push_student(tmp_path / "absent", REPO)
    assert hub.requests == []


def test_offline_mode_is_one_line(hub, plain_run, capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(plain_run) == 1
    assert "unset HF_HUB_OFFLINE" in one_error_line(capfd)


def test_no_network_is_one_line(hub, plain_run, capfd, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(plain_run) == 1
    assert "the connection to the Hub broke" in one_error_line(capfd)


def test_token_in_a_setting_is_never_published(hub, tmp_path, capfd):
    run = make_run(tmp_path / "leaky", plain_student())
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"aa: {HUB_TOKEN}\n")
    assert push(run) == 2
    assert "README.md holds what looks like a Hugging Face token" in one_error_line(capfd)
    assert hub.requests == []


def test_token_is_in_nothing_that_was_published_or_printed(hub, plain_run, capfd, caplog):
    caplog.set_level("DEBUG")
    assert push(plain_run) == 0
    out, err = capfd.readouterr()
    printed = [text.encode() for text in (out, err, caplog.text, repr(hub.requests))]
    assert not any(HUB_TOKEN.encode() in part for part in [*published(hub).values(), *printed])
