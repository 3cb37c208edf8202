"""What tests of pushed students share: the push, what it published, the one line of its error."""

from fixture_parts import HUB_TOKEN

from timm_igkd.cli.main import main

REPO = "user/student"


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
