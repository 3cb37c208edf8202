"""Files of a model on the Hub or at an address: from the local cache, or after a question answered in seconds."""

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

from timm_igkd.hub import TIMEOUT_S
from timm_igkd.hub.cache_notice import cache_use_is_told, cached_revision_is_kept
from timm_igkd.hub.errors import is_passing, with_retries
from timm_igkd.hub.transport import hub_session

ANSWER_S = 4.0
"""Longest wait for an answer unless HF_HUB_ETAG_TIMEOUT is longer; whoever has no network knows it then."""
CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HASH = re.compile(r"-([a-f0-9]{8,})\.")  # the first digits of the content's SHA-256, as torch and timm name files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


def cached_file(repo_id: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """Return the first of these files of a repository that is in the local cache, or None; the Hub is not asked."""
    found = (try_to_load_from_cache(repo_id, name, revision=revision) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def fetch_file(repo_id: str, names: Sequence[str], revision: str | None = None, *, newest: bool = False) -> Path:
    """Return the first of these files that a repository has, downloaded where it is not in the local cache.

    Args:
        repo_id: user/name.
        names: of the files.
        revision: branch, tag or commit; None: main.
        newest: ask the Hub for what a branch or tag is now. Where it cannot be reached the cache serves, which is said.

    Raises:
        what the Hub's client raises for no network, no access, or none of the files (`errors.hub_error` knows it).
    """
    cached, label = cached_file(repo_id, names, revision), repr(f"hf-hub:{repo_id}")
    if cached is not None and (not newest or _COMMIT.fullmatch(revision or "")):
        return cached
    with hub_session(_answer_s()), cache_use_is_told(f"model {label}"):
        try:
            name = _existing_name(repo_id, names, revision)
        except Exception as error:
            if cached is None or not (is_passing(error) or isinstance(error, OfflineModeIsEnabled)):
                raise
            return cached
    with hub_session(TIMEOUT_S):
        return Path(with_retries(lambda: hf_hub_download(repo_id, name, revision=revision), label, TIMEOUT_S))


def fetch_folder(repo_id: str, revision: str | None = None, *, weights: bool) -> Path:
    """Return the folder in the cache that holds a model's config.json and, if asked for, its weights.

    It is that of the commit which the revision is now on the Hub; the last one seen where the Hub cannot be reached.
    """
    with cached_revision_is_kept(repo_id, "model", revision, whole=weights):
        config = fetch_file(repo_id, CONFIG_FILES, revision, newest=True)
        if weights:
            fetch_file(repo_id, WEIGHT_FILES, config.parent.name)  # of the same commit
    return config.parent


def url_file(url: str) -> Path:
    """Return where torch's cache keeps, or would keep, the file of an address."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def fetch_url(url: str) -> Path:
    """Return the file of an address, as timm names some weights, downloaded where torch's cache has it not.

    Raises:
        OSError: no answer, or not in time. RuntimeError: another content than the hash in its name says.
    """
    file = url_file(url)
    if not file.exists():
        question = Request(url, method="HEAD")
        _in_time(lambda seconds: urlopen(question, timeout=seconds).close())
        file.parent.mkdir(parents=True, exist_ok=True)
        promised = _HASH.search(file.name)
        torch.hub.download_url_to_file(url, str(file), promised and promised[1], progress=False)
    return file


def _existing_name(repo_id: str, names: Sequence[str], revision: str | None) -> str:
    *others, last = names
    for name in others:
        try:
            _ask(repo_id, name, revision)
            return name
        except EntryNotFoundError:
            continue
    _ask(repo_id, last, revision)
    return last


def _ask(repo_id: str, name: str, revision: str | None) -> None:
    """Ask whether a repository has a file; an error where it has not."""
    _in_time(lambda seconds: get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), timeout=seconds))


def _answer_s() -> float:
    """Return the longest wait for an answer: the Hub's client's own where the user set one that is longer."""
    theirs = constants.HF_HUB_ETAG_TIMEOUT
    return ANSWER_S if theirs == constants.DEFAULT_ETAG_TIMEOUT else max(ANSWER_S, theirs)


def _in_time(question: Callable[[float], _T]) -> _T:
    """Return the answer to a question, which gets the seconds that it may take.

    Raises:
        TimeoutError: no answer in time; looking a host up by name knows no time-out of its own.
    """
    seconds = _answer_s()
    result: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(question(seconds))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result[0]
