"""Files of a model on the Hub: from the local cache without a question, else after one that is answered in seconds."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from timm_igkd.hub import TIMEOUT_S
from timm_igkd.hub.errors import with_retries
from timm_igkd.hub.transport import hub_session

ANSWER_S = 4.0
"""Longest wait for a first answer; whoever has no network knows it then."""
CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_T = TypeVar("_T")


def cached_file(repo_id: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """Return the first of these files of a repository that is in the local cache, or None; the Hub is not asked."""
    found = (try_to_load_from_cache(repo_id, name, revision=revision) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def fetch_file(repo_id: str, names: Sequence[str], revision: str | None = None) -> Path:
    """Return the first of these files that a repository has, downloaded where it is not in the local cache.

    Raises:
        what the Hub's client raises for no network, no access, or none of the files (`errors.hub_error` knows it).
    """
    cached = cached_file(repo_id, names, revision)
    if cached is not None:
        return cached
    with hub_session(ANSWER_S):
        name = _within(ANSWER_S, lambda: _existing_name(repo_id, names, revision))
    with hub_session(TIMEOUT_S):
        label = repr(f"hf-hub:{repo_id}")
        return Path(with_retries(lambda: hf_hub_download(repo_id, name, revision=revision), label, TIMEOUT_S))


def fetch_folder(repo_id: str, revision: str | None = None, *, weights: bool) -> Path:
    """Return the folder in the cache that holds a model's config.json and, if asked for, its weights."""
    config = fetch_file(repo_id, CONFIG_FILES, revision)
    if weights:
        fetch_file(repo_id, WEIGHT_FILES, config.parent.name)  # of the same commit
    return config.parent


def _existing_name(repo_id: str, names: Sequence[str], revision: str | None) -> str:
    for name in names[:-1]:
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), timeout=ANSWER_S)
            return name
        except EntryNotFoundError:
            continue
    get_hf_file_metadata(hf_hub_url(repo_id, names[-1], revision=revision), timeout=ANSWER_S)
    return names[-1]


def _within(seconds: float, action: Callable[[], _T]) -> _T:
    """Return what an action returns, or raise TimeoutError: looking a host up by name knows no time-out of its own."""
    result: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(action())
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
