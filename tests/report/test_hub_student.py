"""Students on a stand-in for the Hub, over HTTP: what is published, and what comes back in a fresh process."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, NAMES, code_blocks, one_error_line, plain_student, run_python
from huggingface_hub import constants
from student_push_parts import REPO, published, push

from timm_igkd import load_model, push_student, save_model
from timm_igkd.cli.main import main
from timm_igkd.errors import RunError
from timm_igkd.models.loading import weights_hash

pytestmark = HUB_MARKS


ROOT = Path(__file__).resolve().parents[2]


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
    push_student(torch.compile(plain_student()), "user/compiled")
    push_student(plain_run / "student", "user/folder")
    files = [hub.repo(name).files for name in ("user/object", "user/folder", "user/compiled")]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"] == files[2]["model.safetensors"]
    assert b"No results came with these weights" in files[1]["README.md"]


def test_license_of_a_model_in_memory_is_unknown_until_told(hub):
    model = plain_student()
    model.pretrained_cfg["license"] = "mit"  # what timm says of its own weights of this architecture
    push_student(model, REPO)
    assert b"license: unknown\n" in published(hub)["README.md"]
    assert "license" not in json.loads(published(hub)["config.json"])["pretrained_cfg"]
    assert model.pretrained_cfg["license"] == "mit"
    push_student(model, REPO, license="cc-by-nc-4.0")
    assert b"license: cc-by-nc-4.0\n" in published(hub)["README.md"]


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
    push_student(plain_run, REPO, replace=True)
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
