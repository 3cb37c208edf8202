"""Publishing to the Hugging Face Hub: one atomic commit per push, safe to run again after any failure."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi

from timm_igkd.errors import InputError, RunError, check_number
from timm_igkd.hub import TIMEOUT_S
from timm_igkd.hub.cards import is_ours, is_untouched, metadata
from timm_igkd.hub.client import quiet, watched_requests
from timm_igkd.hub.errors import holds_token, with_retries
from timm_igkd.hub.names import is_repo_id
from timm_igkd.version import __version__

_LONGEST_TIMEOUT_S = 86_400  # a day; sockets do not take any number
_TIMEOUT_KINDS = ("connect", "read", "write", "pool")
_NEUTRAL_SUFFIXES = (".md", ".txt", ".png", ".jpg", ".gitignore", ".gitattributes")
_DESCRIBING = ("configs", "model-index")
"""Metadata of a card that tells of the files beside it: where a dataset's splits lie, a model's results."""


class Pushed(str):
    """The address of a commit, or of a pull request, on the Hub.

    Attributes:
        repo_id: the repository.
        commit: its hash; that of the last commit where nothing had changed.
        card_kept: the card there was edited by hand and left as it is.
        card_is_outdated: and its metadata tells of other splits or results than those that were pushed.
        pull_request: the revision of the pull request that holds the commit, "refs/pr/1"; None for one on main.
    """

    repo_id: str
    commit: str
    card_kept: bool
    card_is_outdated: bool
    pull_request: str | None

    def __new__(
        cls,
        url: str,
        repo_id: str,
        commit: str,
        card_kept: bool,
        pull_request: str | None = None,
        *,
        card_is_outdated: bool = False,
    ) -> "Pushed":
        """Return the address with its attributes."""
        pushed = super().__new__(cls, url)
        pushed.repo_id, pushed.commit, pushed.card_kept, pushed.pull_request = repo_id, commit, card_kept, pull_request
        pushed.card_is_outdated = card_is_outdated
        return pushed

    def __getnewargs__(self) -> tuple[str, str, str, bool]:  # type: ignore[override]
        return str(self), self.repo_id, self.commit, self.card_kept  # a copy, or a pickle, sets the attributes itself

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
        held_instead: what of another kind the repository holds by that file's content, in words; None where it is an
            earlier push of the same.
        stale: which of the paths found there an earlier push left, to be removed.
        message: of the commit.
        private: create the repository private.
        overwrite_card: replace a card that was edited by hand.
        replace: replace what the repository holds, its card too, where that is no earlier push of the same; a card of
            one that was edited by hand stays.
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
    held_instead: Callable[[Mapping[str, Any]], str | None] = lambda there: None
    private: bool = False
    overwrite_card: bool = False
    replace: bool = False
    create_pr: bool = False
    timeout_s: float = TIMEOUT_S

    @property
    def label(self) -> str:
        """How messages call the repository."""
        return repo_label(self.repo_id, self.repo_type)


def repo_label(repo_id: str, repo_type: str) -> str:
    """Return how messages call a repository."""
    return f"the Hub's {repo_type} {repo_id!r}"


def check_repo_id(repo_id: str, timeout_s: float = TIMEOUT_S, *, option: str = "--repo-id") -> None:
    """Raise InputError, which names the option, unless `repo_id` is user/name and the time-out is above 0."""
    if not isinstance(repo_id, str) or "/" not in repo_id or not is_repo_id(repo_id):
        raise InputError(
            f"{option} must be user/name, each at most 96 letters, digits, '-', '_' and '.', without '--' and '..' and "
            f"with neither '-', '.' nor '.git' at an end, got {repo_id!r}"
        )
    check_number("--timeout", timeout_s)
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

    Args:
        publication: whose name and login the caller has checked, before it prepared the files.

    Raises:
        RunError: no access, no network, or a repository that holds something else. InputError: a file holds a token.
    """
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

        card = _text(read("README.md")) if "README.md" in there else None
        held = _held(wanted, there, read, card)
    if held and not wanted.replace:
        raise RunError(f"{wanted.label} holds {held}; choose another name, or replace it, its card too, with --replace")
    kept = card is not None and not (wanted.overwrite_card or held) and not is_untouched(card)
    files = wanted.files if kept else {**wanted.files, "README.md": wanted.card.encode()}
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    target: dict[str, Any] = {"revision": revision, "create_pr": wanted.create_pr and opened is None}
    api.preupload_lfs_files(**repo, additions=additions, **target, free_memory=False)  # it also learns what is ignored
    if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
        raise RunError(
            f"{wanted.label} has a .gitignore by which it would not take {ignored[0]!r}; change or remove that file "
            "there, nothing was pushed"
        )
    stale = [CommitOperationDelete(name) for name in sorted(there - set(files)) if wanted.stale(name)]
    commit = api.create_commit(
        **repo, operations=[*additions, *stale], commit_message=wanted.message, parent_commit=info.sha, **target
    )
    address = opened.url if opened else commit.pr_url or commit.commit_url
    return Pushed(
        address,
        wanted.repo_id,
        commit.oid,
        kept,
        revision or commit.pr_revision,
        card_is_outdated=kept and _tells_of_others(card or "", wanted.card),
    )


def _tells_of_others(kept: str, card: str) -> bool:
    """Return whether a card's metadata tells of other files than that of the card which would be in its place."""
    return any(metadata(kept).get(name) != metadata(card).get(name) for name in _DESCRIBING)


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


def _held(wanted: Publication, there: set[str], read: Callable[[str], bytes], card: str | None) -> str | None:
    """Return what a repository holds in words, None where it is empty but for texts and pictures, or ours already."""
    found: Any = None
    if wanted.marker in there:
        with suppress(ValueError):
            found = json.loads(read(wanted.marker))
    if isinstance(found, dict) and (wanted.marker_key in found or (card is not None and is_ours(card))):
        return wanted.held_instead(found)
    foreign = sorted(name for name in there if not _is_neutral(name) or name in wanted.files)
    return f"something else already ({foreign[0]!r})" if foreign else None


def _is_neutral(name: str) -> bool:
    """Return whether a file says nothing of what a repository holds: a text or a picture at its root."""
    return "/" not in name and (name.endswith(_NEUTRAL_SUFFIXES) or name.startswith("LICENSE"))
