"""What is not pushed or not loaded: one line, nothing published, no token anywhere."""

import pytest
import yaml
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, make_run, one_error_line, plain_student
from huggingface_hub import constants
from student_push_parts import REPO, published, push

from timm_igkd import push_student, save_model
from timm_igkd.cli.main import main
from timm_igkd.errors import MissingFileError
from timm_igkd.models.loading import weights_hash
from timm_igkd.report.run_files import update_metrics

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


def test_metrics_of_other_weights_are_not_published(hub, tmp_path, capfd):
    run = make_run(tmp_path / "run", plain_student())
    update_metrics(run / "metrics.json", {"weights_sha256": weights_hash(plain_student())})
    assert push(run) == 0
    capfd.readouterr()
    save_model(plain_student(seed=8), run / "student")
    before = hub.repo(REPO).head
    assert push(run) == 2
    assert "is of other weights than its student/; push the folder student/" in one_error_line(capfd)
    assert hub.repo(REPO).head == before


def test_run_without_metrics_is_published_with_a_warning(hub, tmp_path, capfd):
    run = make_run(tmp_path / "run", plain_student())
    (run / "metrics.json").unlink()
    assert push(run) == 0
    assert "has no metrics.json: the card tells no results" in capfd.readouterr().err


def test_maps_that_a_run_did_not_read_are_not_linked(hub, tmp_path, capfd):
    run = make_run(tmp_path / "run", plain_student())
    for change, status in (("overlay_prob: 0.0", 2), ("overlay_prob: 0.0\nstored_logits: true", 0)):
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("overlay_prob: 0.1", change))
        assert push(run, "--maps-repo", "user/maps") == status
        (run / "config.yaml").write_text(config)
        if status:
            assert "this run read none; leave it out" in one_error_line(capfd)
            assert hub.requests == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("overlay_prob", "high"), ("distill_loss_weight", "x"), ("attention_loss_weight", [1]), ("overlay_prob", True)],
)
def test_a_setting_that_is_no_number_is_one_line(hub, tmp_path, capfd, setting, value):
    run = make_run(tmp_path / "run", plain_student())
    config = yaml.safe_load((run / "config.yaml").read_text()) | {setting: value}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert push(run) == 2
    assert f"has {setting} {value!r}, expected a number; restore it" in one_error_line(capfd)
    assert hub.requests == []


def test_bad_name_of_the_maps_is_told_by_its_option(hub, plain_run, capfd):
    assert push(plain_run, "--maps-repo", "maps") == 2
    assert "--maps-repo must be user/name" in one_error_line(capfd)


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
