"""What tests of pushed students share: the push, what it published, the one line of its error."""

from timm_igkd.cli.main import main

REPO = "user/student"


def push(folder, *options, repo=REPO):
    return main(["push-student", str(folder), "--repo-id", repo, *options])


def published(hub, repo=REPO):
    return hub.repo(repo).files
