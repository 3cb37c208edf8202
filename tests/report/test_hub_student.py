import hashlib
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from fixture_parts import HUB_TOKEN
from hub_parts import NAMES, build_maps, code_blocks, make_run, plain_student, plugin_student, run_python
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http, get_session

from timm_igkd import load_model, push_student, save_model
from timm_igkd.cli.main import main
from timm_igkd.errors import MissingFileError, RunError
from timm_igkd.hub import errors as hub_errors
from timm_igkd.models.loading import weights_hash
from timm_igkd.report.push import verify_published

pytestmark = [  # huggingface_hub hands files to its HTTP client in a form that the client would like to see go
    pytest.mark.hub,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
REPO = "user/student"


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "plain", plain_student())


@pytest.fixture(scope="module")
def plugin_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    build_maps(root / "maps")
    return make_run(root / "plugin", plugin_student(), root / "maps")


@pytest.fixture
def another(plain_run, tmp_path):
    return make_run(tmp_path / "another", plain_student(seed=9))


def push(folder, *options, repo=REPO):
    return main(["push-student", str(folder), "--repo-id", repo, *options])


def published(hub, repo=REPO):
    return hub.repo(repo).files


def one_error_line(capfd):
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("timm-igkd: error: ")
    assert HUB_TOKEN not in out + err
    return lines[0]


# ---- what is published ----


def test_pushed_files_are_safetensors_config_and_card_in_one_commit(hub, plain_run):
    pushed = push_student(plain_run, REPO)
    assert set(published(hub)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert len(hub.repo(REPO).commits) == 2
    assert pushed == f"{hub.endpoint}/{REPO}/commit/{hub.repo(REPO).head}"
    assert pushed.commit == hub.repo(REPO).head
    config = json.loads(published(hub)["config.json"])
    assert config["architecture"] == "test_resnet"
    assert config["label_names"] == NAMES


def test_weights_come_back_bit_equal(hub, plain_run):
    push_student(plain_run, REPO)
    back, here = load_model(f"hf-hub:{REPO}"), load_model(f"local-dir:{plain_run / 'student'}")
    assert weights_hash(back) == weights_hash(here)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(back(image), here(image))


def test_model_object_and_timm_folder_are_pushed_too(hub, plain_run):
    push_student(plain_student(), "user/object")
    push_student(plain_run / "student", "user/folder")
    files = [hub.repo(name).files for name in ("user/object", "user/folder")]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]
    assert b"No results came with these weights" in files[1]["README.md"]


def test_pickled_weights_become_safetensors(hub, tmp_path):
    model = plain_student()
    save_model(model, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    push_student(tmp_path / "old", REPO)
    assert "pytorch_model.bin" not in published(hub)
    assert weights_hash(load_model(f"hf-hub:{REPO}")) == weights_hash(model)


def test_pickle_of_an_earlier_timm_push_is_removed(hub, plain_run):
    repo = hub.add(REPO)
    repo.commit({"config.json": b'{"architecture": "resnet18"}', "pytorch_model.bin": b"x", "notes.txt": b"mine"})
    push_student(plain_run, REPO)
    assert "pytorch_model.bin" not in published(hub)
    assert published(hub)["notes.txt"] == b"mine"


def test_pushing_the_same_again_commits_nothing(hub, plain_run):
    first = push_student(plain_run, REPO)
    assert push_student(plain_run, REPO) == first
    assert len(hub.repo(REPO).commits) == 2


def test_pushing_again_updates_weights_and_card(hub, plain_run, another):
    push_student(plain_run, REPO)
    old = published(hub)
    (another / "metrics.json").write_text((plain_run / "metrics.json").read_text().replace("80.0", "70.0"))
    push_student(another, REPO)
    assert published(hub)["model.safetensors"] != old["model.safetensors"]
    assert b"70.0" in published(hub)["README.md"]
    assert len(hub.repo(REPO).commits) == 3


def test_card_edited_by_hand_is_kept_unless_told_otherwise(hub, plain_run, another, capfd):
    push_student(plain_run, REPO)
    edited = published(hub)["README.md"].replace(b"# student", b"# My student")
    hub.repo(REPO).commit({**published(hub), "README.md": edited})
    assert push(another) == 0
    assert "edited by hand" in capfd.readouterr().err
    assert published(hub)["README.md"] == edited
    assert weights_hash(load_model(f"hf-hub:{REPO}")) == weights_hash(load_model(f"local-dir:{another / 'student'}"))
    assert push(another, "--overwrite-card") == 0
    assert b"# My student" not in published(hub)["README.md"]


def test_card_saved_with_other_line_ends_is_not_an_edit(hub, plain_run, another):
    push_student(plain_run, REPO)
    windows = published(hub)["README.md"].replace(b"\n", b"\r\n")
    hub.repo(REPO).commit({**published(hub), "README.md": windows})
    assert not push_student(another, REPO).card_kept


def test_private_repository_needs_the_token(hub, plain_run, monkeypatch, tmp_path):
    push_student(plain_run, REPO, private=True)
    assert hub.repo(REPO).private
    assert load_model(f"hf-hub:{REPO}").num_classes == 2
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(RunError, match="does not exist, or is private"):
        load_model(f"hf-hub:{REPO}")


def test_private_push_refuses_a_repository_that_is_public(hub, plain_run, capfd):
    hub.add(REPO)
    assert push(plain_run, "--private") == 1
    assert "is public already" in one_error_line(capfd)
    assert set(published(hub)) == {".gitattributes"}


# ---- in a fresh process, with an empty cache ----


@pytest.mark.slow
def test_plain_student_loads_in_a_fresh_process_without_the_plugin(hub, plain_run, tmp_path):
    push_student(plain_run, REPO)
    (usage,) = code_blocks(published(hub)["README.md"].decode())
    assert "timm_igkd" not in usage
    check = """
import hashlib, sys
assert "timm_igkd" not in sys.modules
names = {n: t.numpy().tobytes() for n, t in model.state_dict().items()}
print(hashlib.sha256(b"".join(names[n] for n in sorted(names))).hexdigest())
"""
    out = run_python(usage + check, hub.environment(tmp_path / "home", None), tmp_path).splitlines()
    assert out[0].split()[0] in NAMES
    state = timm.create_model(f"local-dir:{plain_run / 'student'}", pretrained=True).state_dict()
    assert out[1] == hashlib.sha256(b"".join(state[n].numpy().tobytes() for n in sorted(state))).hexdigest()


def test_plugin_student_loads_in_a_fresh_process_as_its_card_says(hub, plugin_run, tmp_path):
    push_student(plugin_run, REPO, private=True)
    (usage,) = code_blocks(published(hub)["README.md"].decode())
    assert usage.startswith("import timm_igkd")
    check = "\nfrom timm_igkd.models.loading import weights_hash\nprint(weights_hash(model))\n"
    out = run_python(usage + check, hub.environment(tmp_path / "home", HUB_TOKEN), tmp_path).splitlines()
    assert out[1] == weights_hash(load_model(f"local-dir:{plugin_run / 'student'}"))
    assert HUB_TOKEN not in "".join(out)


def test_pushed_student_serves_as_teacher(hub, plugin_run, tiny_images, tmp_path):
    push_student(plugin_run, REPO)
    folder = tiny_images(n=2, size=24, split="train")
    arguments = ["--dataset", str(folder), "--split", "train", "--out", str(tmp_path / "out"), "--n-steps", "2"]
    # The tiny images' classes are not cat and dog: the student's outputs are asked for as they are.
    model = load_model(f"hf-hub:{REPO}")
    assert weights_hash(model) == weights_hash(load_model(f"local-dir:{plugin_run / 'student'}"))
    save_model(model, tmp_path / "unnamed")
    config = json.loads((tmp_path / "unnamed" / "config.json").read_text())
    config["pretrained_cfg"].pop("label_names", None)
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps(config))
    push_student(tmp_path / "unnamed", "user/unnamed")
    assert main(["maps", "--teacher", "hf-hub:user/unnamed", *arguments]) == 0
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["teacher"]["name"] == "hf-hub:user/unnamed"
    assert provenance["teacher"]["weights_sha256"] == weights_hash(model)


# ---- refusals: one line, nothing published ----


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


# ---- faults of the network and the server ----


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


# ---- installed in other ways ----


def push_in_a_process(command, hub, tmp_path, **variables):
    empty = tmp_path / "empty"
    empty.mkdir()
    env = hub.environment(tmp_path / "home", HUB_TOKEN) | variables
    return subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_script_pushes_from_a_checkout(hub, plain_run, tmp_path):
    script = [sys.executable, str(ROOT / "hub" / "push_student.py"), str(plain_run), "--repo-id", REPO]
    done = push_in_a_process(script, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "README.md" in published(hub)
    assert HUB_TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_built_wheel_pushes_from_an_empty_folder(hub, plugin_run, tmp_path):
    run = [sys.executable, "-m"]
    out, target = str(tmp_path / "dist"), str(tmp_path / "site")
    for command in (
        [*run, "build", "--wheel", "--no-isolation", "--outdir", out, str(ROOT)],
        [*run, "pip", "install", "-q", "--no-deps", "--no-index", "--find-links", out, "--target", target, "timm-igkd"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    code = f"""
import sys, timm_igkd
assert timm_igkd.__file__.startswith({target!r}), timm_igkd.__file__
from timm_igkd.cli.main import main
sys.exit(main(["push-student", {str(plugin_run)!r}, "--repo-id", {REPO!r}]))
"""
    done = push_in_a_process([sys.executable, "-c", code], hub, tmp_path, PYTHONPATH=target)
    assert done.returncode == 0, done.stderr
    wheel_card = published(hub)["README.md"]
    push_student(plugin_run, REPO)
    assert published(hub)["README.md"] == wheel_card
    assert len(hub.repo(REPO).commits) == 2
