"""The cache of the Hub's files: its use in place of the Hub is said, and a broken download leaves it as it was."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from timm_igkd.files import write_atomic
from timm_igkd.hub.client import quiet, watched_requests

_ABSENT_FILE = "EntryNotFound"  # an answer to a question whether a file is there, not a refusal
_NO_ANSWER = "no answer"


@contextmanager
def cache_use_is_told(what: str) -> Iterator[None]:
    """Print one line on stderr where a request failed meanwhile and the work went on: with the copy in the cache.

    Args:
        what: how the line calls what is read.
    """
    answers: dict[tuple[str, str], str | None] = {}  # the last one counts: the client asks again after some failures
    host = urlsplit(constants.ENDPOINT).hostname  # storage and the viewer of data sets, which may fail, are elsewhere

    def note(request: Any, answer: str | None) -> None:
        if request.url.host == host:
            answers[request.method, request.url.path] = answer

    def asked(request: Any) -> None:
        note(request, _NO_ANSWER)

    def answered(response: Any) -> None:
        note(response.request, _failure(response))

    with watched_requests(asked, answered), quiet("huggingface_hub", "datasets"):  # each would say it in its own way
        yield
    failure = next((failure for failure in answers.values() if failure), None)
    if failure is not None:
        print(f"warning: {what} was asked for at the Hub, {failure}; the copy in the cache is used", file=sys.stderr)


@contextmanager
def cached_revision_is_kept(
    repo_id: str, repo_type: Literal["model", "dataset"], revision: str | None, *, whole: bool = True
) -> Iterator[None]:
    """Leave the copy in the cache in use where the download of a newer commit fails, or is of a part of it.

    The client notes which commit a branch is before it has its files; without the Hub it would then find none whole.

    Args:
        repo_id: user/name.
        repo_type: of the repository.
        revision: branch, tag or commit; None: main.
        whole: False: a part is downloaded.
    """
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type))
    ref = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    before = ref.read_bytes() if ref.is_file() else None
    is_whole = False
    try:
        yield
        is_whole = whole
    finally:
        if before is not None and not is_whole:
            with suppress(OSError):  # of a cache that may not be written; what went wrong is what is raised
                if ref.read_bytes() != before:
                    write_atomic(ref, before)


def _failure(response: Any) -> str | None:
    """Return what the Hub said where it gave nothing; None for an answer."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if status < 400 or code == _ABSENT_FILE:
        return None
    return f"status {status}" + (f" ({code})" if code and code.isalnum() else "")
