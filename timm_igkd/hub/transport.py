"""Publishing to the Hugging Face Hub: one atomic commit per push, safe to run again after any failure."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi

from timm_igkd.errors import InputError, RunError
from timm_igkd.hub import TIMEOUT_S
from timm_igkd.hub.cards import is_untouched
from timm_igkd.hub.client import quiet, watched_requests
from timm_igkd.hub.errors import ForeignRepositoryError, holds_token, with_retries
from timm_igkd.version import __version__

_LONGEST_TIMEOUT_S = 86_400  # a day; sockets do not take any number
_TIMEOUT_KINDS = ("connect", "read", "write", "pool")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_NEUTRAL_SUFFIXES = (".md", ".txt", ".png", ".jpg", ".gitignore", ".gitattributes")


class Pushed(str):
    """The address of a commit, or of a pull request, on the Hub.

    Attributes:
        repo_id: the repository.
        commit: its hash; that of the last commit where nothing had changed.
        card_kept: the card there was edited by hand and left as it is.
        pull_request: the revision of the pull request that holds the commit, "refs/pr/1"; None for one on main.
    """

    repo_id: str
    commit: str
    card_kept: bool
    pull_request: str | None

    def __new__(cls, url: str, repo_id: str, commit: str, card_kept: bool, pull_request: str | None = None) -> "Pushed":
        """Return the address with its attributes."""
        pushed = super().__new__(cls, url)
        pushed.repo_id, pushed.commit, pushed.card_kept, pushed.pull_request = repo_id, commit, card_kept, pull_request
        return pushed

    @property
    def name(self) -> str:
        """user/name, with "@refs/pr/1" for what is in a pull request alone."""
        return f"{self.repo_id}@{self.pull_request}" if self.pull_request else self.repo_id


@dataclass(frozen=True)
class Publication:
    """What one push makes of a repository.

    Attributes:
        repo_id: user/name.
        repo_type: "model" or "dataset".
        files: path in the repository to content; the card is not among them.
        card: README.md.
        marker: the JSON file by which a repository that is not empty is known as ours.
        marker_key: a key that it has.
        stale: which of the paths found there an earlier push left, to be removed.
        message: of the commit.
        private: create the repository private.
        overwrite_card: replace a card that was edited by hand.
        create_pr: open a pull request in place of a commit on main; the repository must be there.
        timeout_s: longest silence of the Hub before a request is given up and made again.
    """

    repo_id: str
    repo_type: Literal["model", "dataset"]
    files: dict[str, bytes | Path]
    card: str
    marker: str
    marker_key: str
    stale: Callable[[str], bool]
    message: str
    private: bool = False
    overwrite_card: bool = False
    create_pr: bool = False
    timeout_s: float = TIMEOUT_S

    @property
    def label(self) -> str:
        """How messages call the repository."""
        return repo_label(self.repo_id, self.repo_type)


def repo_label(repo_id: str, repo_type: str) -> str:
    """Return how messages call a repository."""
    return f"the Hub's {repo_type} {repo_id!r}"


def check_repo_id(repo_id: str, timeout_s: float = TIMEOUT_S) -> None:
    """Raise InputError unless `repo_id` is user/name and the time-out is above 0."""
    if not _REPO_ID.fullmatch(repo_id):
        raise InputError(f"--repo-id must be user/name, letters, digits, '-', '_' and '.', got {repo_id!r}")
    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        raise InputError(f"--timeout must be above 0 and at most {_LONGEST_TIMEOUT_S} seconds, got {timeout_s:g}")


def require_login(repo_id: str) -> None:
    """Raise RunError where no token is at hand, before anything expensive."""
    if huggingface_hub.get_token() is None:
        raise RunError(f"no Hugging Face login to push to {repo_id!r}; log in with: hf auth login (or set HF_TOKEN)")


@contextmanager
def hub_session(timeout_s: float) -> Iterator[None]:
    """Give our requests to the Hub a time-out, which most lack, and keep its client quiet: we retry and report."""

    def limit(request: Any) -> None:  # uploads take the client's time-out, questions say None themselves
        given = request.extensions.get("timeout", {})
        limits = {kind: timeout_s if given.get(kind) is None else given[kind] for kind in _TIMEOUT_KINDS}
        request.extensions = {**request.extensions, "timeout": limits}

    with watched_requests(limit), quiet("huggingface_hub", bars=False):
        yield


def publish(publication: Publication) -> Pushed:
    """Bring a repository, created if need be, to the wanted state in one commit, on main or in a pull request.

    A failure leaves its main branch as it was; running again goes on, and does nothing where everything is there.

    Raises:
        RunError: no access, no network, or a repository that holds something else. InputError: a file holds a token.
    """
    check_repo_id(publication.repo_id, publication.timeout_s)
    require_login(publication.repo_id)
    for name, content in {**publication.files, "README.md": publication.card.encode()}.items():
        if PurePosixPath(name).suffix in (".md", ".json", ".yaml") and holds_token(_bytes(content)):
            raise InputError(f"{name} holds what looks like a Hugging Face token; remove it, nothing was pushed")
    api = HfApi(library_name="timm-igkd", library_version=__version__)
    with hub_session(publication.timeout_s):
        return with_retries(lambda: _commit(api, publication), publication.label, publication.timeout_s)


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _commit(api: HfApi, wanted: Publication) -> Pushed:
    """Look at the repository as it is now and commit what is missing on top of exactly that state."""
    repo: dict[str, Any] = {"repo_id": wanted.repo_id, "repo_type": wanted.repo_type}
    if not wanted.create_pr:
        api.create_repo(**repo, private=wanted.private or None, exist_ok=True)
    opened = _opened_before(api, wanted) if wanted.create_pr else None
    revision = opened.git_reference if opened else None
    info: Any = api.repo_info(**repo, revision=revision)
    if wanted.private and not info.private:
        raise RunError(
            f"{wanted.label} is public already; choose another name, or make it private in its settings first"
        )
    there = {sibling.rfilename for sibling in info.siblings or ()}
    with tempfile.TemporaryDirectory() as folder:

        def read(name: str) -> bytes:
            return Path(api.hf_hub_download(**repo, filename=name, revision=info.sha, cache_dir=folder)).read_bytes()

        _check_ours(wanted, there, read)
        kept = "README.md" in there and not wanted.overwrite_card and not is_untouched(_text(read("README.md")))
    files = wanted.files if kept else {**wanted.files, "README.md": wanted.card.encode()}
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(there - set(files)) if wanted.stale(name)]
    commit = api.create_commit(
        **repo,
        operations=operations,
        commit_message=wanted.message,
        parent_commit=info.sha,
        revision=revision,
        create_pr=wanted.create_pr and opened is None,
    )
    address = opened.url if opened else commit.pr_url or commit.commit_url
    return Pushed(address, wanted.repo_id, commit.oid, kept, revision or commit.pr_revision)


def _opened_before(api: HfApi, wanted: Publication) -> Discussion | None:
    """Return the open pull request of an earlier push, also of one whose answer was lost: it is updated, not doubled.

    Known by its author and its title, which is the message of its first commit.
    """
    found = api.get_repo_discussions(
        wanted.repo_id,
        repo_type=wanted.repo_type,
        author=api.whoami()["name"],
        discussion_type="pull_request",
        discussion_status="open",
    )
    return next((request for request in found if request.title == wanted.message), None)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")


def _check_ours(wanted: Publication, there: set[str], read: Callable[[str], bytes]) -> None:
    """Raise unless the repository is empty but for cards and pictures, or holds an earlier push of this kind."""
    if wanted.marker in there:
        content = read(wanted.marker)
        with suppress(ValueError):
            if wanted.marker_key in json.loads(content):
                return
    foreign = sorted(name for name in there if not name.endswith(_NEUTRAL_SUFFIXES) and not name.startswith("LICENSE"))
    if foreign:
        raise ForeignRepositoryError(
            f"{wanted.label} holds something else already ({foreign[0]!r}); choose another name, or empty it first"
        )
