"""push-student and push-maps with --create-pr: a pull request in place of a commit on main."""

import copy
import pickle
import re

import pytest
import timm
from fixture_parts import HUB_TOKEN
from hub_parts import HUB_MARKS, IMAGES, make_run, plain_student
from tiny_parts import tiny_teacher

from timm_igkd import IGOptions, MapStore, compute_maps, push_maps, push_student
from timm_igkd.cli.main import main
from timm_igkd.hub.transport import Pushed
from timm_igkd.models.loading import load_model, weights_hash

pytestmark = HUB_MARKS
REPO = "user/student"
OTHERS = "other/student"


def refused(capfd, folder, repo=REPO, *options):
    """Push into a pull request, which must fail, and return its one line."""
    assert main(["push-student", str(folder), "--repo-id", repo, "--create-pr", *options]) == 1
    out, err = capfd.readouterr()
    assert len(err.strip().splitlines()) == 1, err
    assert HUB_TOKEN not in out + err
    return err


def test_student_goes_into_a_pull_request_and_main_stays_as_it_is(hub, student_run, capfd):
    hub.add(REPO)
    assert main(["push-student", str(student_run), "--repo-id", REPO, "--create-pr"]) == 0
    assert set(hub.repo(REPO).files) == {".gitattributes"}
    (request,) = hub.repo(REPO).pull_requests
    assert set(request.commits[-1][1]) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    address, usage = capfd.readouterr().out.splitlines()
    assert address == f"{hub.endpoint}/{REPO}/discussions/1"
    model = timm.create_model(usage.split('"')[1], pretrained=True)
    assert weights_hash(model) == weights_hash(load_model(f"local-dir:{student_run / 'student'}"))


def test_maps_go_into_a_pull_request_and_are_read_from_there(hub, store, capfd):
    hub.add("user/maps", "datasets")
    assert main(["push-maps", str(store.path), "--repo-id", "user/maps", "--create-pr"]) == 0
    assert set(hub.repo("user/maps", "datasets").files) == {".gitattributes"}
    address, usage = capfd.readouterr().out.splitlines()
    assert address == f"{hub.endpoint}/datasets/user/maps/discussions/1"
    assert MapStore(usage.split('"')[1]).rows[:] == store.rows[:]


def test_pull_request_needs_no_right_to_write(hub, student_run):
    hub.add(OTHERS)
    pushed = push_student(student_run, OTHERS, create_pr=True)
    assert pushed.pull_request == "refs/pr/1"
    assert hub.repo(OTHERS).pull_requests[0].author == "user"


def test_pushing_again_updates_the_open_pull_request(hub, student_run, tmp_path):
    hub.add(REPO)
    first = push_student(student_run, REPO, create_pr=True)
    assert push_student(student_run, REPO, create_pr=True) == first
    (request,) = hub.repo(REPO).pull_requests
    assert len(request.commits) == 1
    other = make_run(tmp_path / "other", plain_student(seed=7))
    assert push_student(other, REPO, create_pr=True) == first
    assert len(request.commits) == 2


def test_a_store_that_grew_updates_its_pull_request(hub, store, tmp_path):
    hub.add("user/maps", "datasets")
    options = {"options": IGOptions(n_steps=2), "shard_size": 4, "progress": False}
    smaller = compute_maps(tiny_teacher(), IMAGES, tmp_path / "smaller", limit=6, **options)
    first = push_maps(smaller.path, "user/maps", create_pr=True)
    assert push_maps(store.path, "user/maps", create_pr=True) == first
    (request,) = hub.repo("user/maps", "datasets").pull_requests
    assert len(request.commits) == 2
    assert re.fullmatch(r"Integrated.gradients maps of .* for noise, split train", request.title)


def test_pull_request_of_someone_else_is_left_alone(hub, student_run):
    hub.add(REPO)
    push_student(student_run, REPO, create_pr=True)
    hub.repo(REPO).pull_requests[0].author = "stranger"
    assert push_student(student_run, REPO, create_pr=True).pull_request == "refs/pr/2"


def test_lost_answer_opens_one_pull_request(hub, student_run):
    hub.add(REPO)
    hub.fault("lost", "POST", "/commit/main")
    pushed = push_student(student_run, REPO, create_pr=True)
    assert len(hub.repo(REPO).pull_requests) == 1
    assert pushed == f"{hub.endpoint}/{REPO}/discussions/1"


def test_nothing_to_change_on_main_opens_no_pull_request(hub, store):
    pushed = push_maps(store.path, "user/maps")
    again = push_maps(store.path, "user/maps", create_pr=True)
    assert (again.commit, again.pull_request) == (pushed.commit, None)
    assert hub.repo("user/maps", "datasets").pull_requests == []


def test_missing_repository_is_one_line_and_is_not_created(hub, student_run, capfd):
    assert "does not exist, or is private" in refused(capfd, student_run)
    assert hub.repos == {}


def test_private_repository_of_others_is_one_line(hub, student_run, capfd):
    hub.add(OTHERS, private=True)
    assert "does not exist, or is private" in refused(capfd, student_run, OTHERS)


def test_repository_without_pull_requests_is_one_line(hub, student_run, capfd):
    hub.add(OTHERS, takes_pull_requests=False)
    assert f"'{OTHERS}' takes no pull request from this login" in refused(capfd, student_run, OTHERS)


def test_private_pull_request_to_a_public_repository_is_refused(hub, student_run, capfd):
    hub.add(REPO)
    assert "is public already" in refused(capfd, student_run, REPO, "--private")
    assert hub.repo(REPO).pull_requests == []


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda pushed: pickle.loads(pickle.dumps(pushed))])
def test_what_a_push_returns_can_be_copied_and_pickled(again):
    pushed = Pushed("https://hub/commit", REPO, "abc", True, "refs/pr/1", card_is_outdated=True)
    found = again(pushed)
    assert (type(found), found, found.name, vars(found)) == (Pushed, pushed, pushed.name, vars(pushed))
