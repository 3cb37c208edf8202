"""What can go wrong between us and the Hub: which failures pass if one tries again, and one line for the others."""

import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import errors as hub_errors
from huggingface_hub import get_token
from huggingface_hub.utils import parse_ratelimit_headers

from timm_igkd.errors import InputError, RunError, UserError, first_line, without_credentials
from timm_igkd.hub.client import watched_requests

RETRY_WAITS_S = (1.0, 2.0, 4.0)
LONGEST_TOLD_WAIT_S = 300.0
"""Longest wait that the Hub tells us and we keep: the window of its own limits."""
_SAID_FROM_S = 10.0
# 409 and 412: the branch moved while we prepared the commit; it is prepared again from what is there now.
_PASSING_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_ADDRESS = re.compile(r"\b\w+://[^\s'\"<>]+")
_MISSING_FILE = "lacks a file that it should hold; push it again"
_T = TypeVar("_T")


def redact(text: str) -> str:
    """Return a text without Hugging Face tokens."""
    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "***") if token else text)


def without_secrets(text: str) -> str:
    """Return a text without what an address or a command may hold: user, password, query, authorization, tokens."""
    text = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", without_credentials(text))
    return redact(re.sub(r"(?i)(authorization\s*[:=]\s*)(?:(?:bearer|basic|token)\s+)?[^\s'\"]+", r"\1***", text))


def holds_token(content: bytes) -> bool:
    """Return whether a text holds the token in use or what looks like one, also behind Markdown's escapes."""
    token, content = get_token(), content.replace(b"\\", b"")
    return bool(token and token.encode() in content) or re.search(rb"\bhf_[A-Za-z0-9]{30,}", content) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it; the client wraps an upload's error in a bare RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport(error: BaseException, name: str = "TransportError") -> bool:
    """Tell by name, as huggingface_hub 1 raises errors of httpx and huggingface_hub 2 those of httpx2."""
    return any(
        base.__module__.split(".")[0] in ("httpx", "httpx2") and base.__name__ == name for base in type(error).__mro__
    )


def is_passing(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    for cause in _causes(error):
        if isinstance(cause, hub_errors.HfHubHTTPError) and _status(cause) is not None:
            return _status(cause) in _PASSING_STATUS
        if isinstance(cause, UserError | hub_errors.OfflineModeIsEnabled):
            return False
        if isinstance(cause, RuntimeError) and "client has been closed" in str(cause):
            return True  # by the Hub's client in another thread, where that failed to connect
        # A server in trouble answers with a page where the client expects JSON.
        if _is_transport(cause) or isinstance(cause, json.JSONDecodeError | ConnectionError | TimeoutError):
            return True
    return False


def with_retries(action: Callable[[], _T], repo: str, timeout_s: float) -> _T:
    """Run an action that may safely run again; what passes is tried again, the rest becomes one line.

    Args:
        action: idempotent.
        repo: how errors call the repository.
        timeout_s: the time-out of one request; five of them without any answer are the end.

    Raises:
        RunError: the Hub cannot be reached, refuses, or has no such repository. InputError: no valid name.
    """
    answered = time.monotonic()  # the last time: uploads take as long as they take

    def note_answer(response: object) -> None:
        nonlocal answered
        answered = time.monotonic()

    with watched_requests(lambda request: None, note_answer):
        for tries, wait in enumerate((*RETRY_WAITS_S, None), start=1):
            try:
                return action()
            except Exception as error:
                is_silent = _is_timeout(error) and time.monotonic() - answered > 5 * timeout_s
                told = _told_wait(error) or 0.0
                if wait is None or not is_passing(error) or is_silent or told > LONGEST_TOLD_WAIT_S:
                    raise one_line_error(error, repo, timeout_s, tries) from error
                if told > _SAID_FROM_S:
                    print(f"{repo}: the Hub asks us to wait {told:.0f} s, then it goes on", file=sys.stderr)
                time.sleep(max(wait, told))
                answered += max(wait, told)
    raise AssertionError("unreachable")


def _told_wait(error: BaseException) -> float | None:
    """Return the seconds after which the Hub wants to be asked again, None where it tells none."""
    for cause in _causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", {})
        value = headers.get("Retry-After", "")
        if value.isdigit():
            return float(value)
        if _status(cause) == 429 and (limit := parse_ratelimit_headers(headers)):
            return float(limit.reset_in_seconds)
    return None


def _is_timeout(error: BaseException) -> bool:
    return any(_is_transport(cause, "TimeoutException") or isinstance(cause, TimeoutError) for cause in _causes(error))


def one_line_error(error: Exception, repo: str, timeout_s: float, tries: int | None = None) -> Exception:
    """Return the error to raise for what a request to the Hub raised; it quotes neither token nor address."""
    found = hub_error(error, repo, timeout_s, tries=tries)
    if found is not None:
        return found
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
    if isinstance(error, json.JSONDecodeError):
        return RunError(_odd_answer(repo))
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return RunError(f"{repo}: {type(root).__name__}: {_quoted(first_line(root))}")


def _quoted(text: str) -> str:
    return _ADDRESS.sub("(address)", redact(text))


def hub_error(
    error: BaseException,
    repo: str,
    timeout_s: float | None = None,
    missing_file: str = _MISSING_FILE,
    tries: int | None = None,
) -> UserError | None:
    """Return the error to raise for what the Hub's client raised, or wrapped; None for what is not the Hub's.

    Args:
        error: quoted at most by its status and what the Hub says of it: no token, no address.
        repo: how messages call the repository.
        timeout_s: the time-out of one request, where there is one of ours.
        missing_file: what to say where the repository lacks the file that was asked for.
        tries: how often it was tried, where that is known.
    """
    times = f", {tries} times" if tries and tries > 1 else ""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return cause
        text = _known(cause, repo, missing_file) or _status_text(cause, repo, times)
        if text:
            return InputError(text) if isinstance(cause, hub_errors.HFValidationError) else RunError(text)
    for cause in _causes(error):  # only now: a bare ConnectionError may hide which of the above it was
        if _is_timeout(cause):
            within = f" within {timeout_s:g} s{times}" if timeout_s else ""
            longer = "" if timeout_s else ", or with a higher HF_HUB_ETAG_TIMEOUT, the seconds that it may take"
            return RunError(
                f"the Hub gave no answer about {repo}{within}; "
                f"run the same command again later{longer}: it goes on and does nothing twice"
            )
        if _is_transport(cause) or isinstance(cause, ConnectionError):
            return RunError(
                f"{repo} cannot be reached, the connection to the Hub broke ({type(cause).__name__}); check the "
                "network (and HF_HUB_OFFLINE), and run the same command again: it does nothing twice"
            )
    is_the_hubs = any(isinstance(cause, hub_errors.HfHubHTTPError) for cause in _causes(error))
    return RunError(_odd_answer(repo)) if is_the_hubs else None


def _odd_answer(repo: str) -> str:
    return f"the Hub's answer about {repo} is not what it should be; check HF_ENDPOINT, or try again later"


def _known(error: BaseException, repo: str, missing_file: str) -> str | None:
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (hub_errors.HFValidationError, "is no name of a repository; expected user/name"),
        (hub_errors.GatedRepoError, "is gated; ask for access on its page, then log in with: hf auth login"),
        (
            hub_errors.RepositoryNotFoundError,
            "does not exist, or is private and this login may not see it; check the name, or log in: hf auth login",
        ),
        (hub_errors.DisabledRepoError, "is disabled on the Hub; see its page, or take another"),
        (hub_errors.RevisionNotFoundError, "has no such revision; name a branch, a tag or a commit of it"),
        (hub_errors.EntryNotFoundError, missing_file),
        (hub_errors.OfflineModeIsEnabled, "cannot be reached in offline mode; unset HF_HUB_OFFLINE"),
    )
    if isinstance(error, hub_errors.LocalEntryNotFoundError):  # an EntryNotFoundError too
        later = itertools.islice(_causes(error), 1, None)
        if any(isinstance(cause, hub_errors.HfHubHTTPError | hub_errors.OfflineModeIsEnabled) for cause in later):
            return None
        return f"{repo} is not in the local cache, and the Hub cannot be reached; check the network"
    for kind, text in kinds:
        if isinstance(error, kind):
            return f"{repo} {text}"
    return None


def _status_text(error: BaseException, repo: str, times: str) -> str | None:
    status = _status(error)
    if not isinstance(error, hub_errors.HfHubHTTPError) or status is None:
        return None
    if status == 401:
        return (
            f"the Hub refused the token when asked about {repo}; log in again with: hf auth login (or correct HF_TOKEN)"
        )
    if status == 403 and _asked_for_pull_request(error):
        return f"{repo} takes no pull request from this login; ask its owner to allow them, or push under your own name"
    if status == 403 and _asked_to_read(error):
        return f"this login may not read {repo}; ask its owner for access, or log in as another: hf auth login"
    if status == 403:
        return (
            f"this login may not write to {repo}; choose a name under "
            "your own user or organisation, and a token with write access"
        )
    if status == 402:
        return f"the Hub takes no more for {repo} without payment (status 402); see the billing page of its owner there"
    if status in (409, 412):
        return f"{repo} changed while it was pushed to{times}; push when nobody else does"
    if status == 413:
        return f"the Hub takes no file or commit of this size for {repo} (status 413); divide it, maps by --shard-size"
    if status == 429:
        told = _told_wait(error)
        when = f"{told:.0f} s" if told else "some minutes"
        return f"the Hub limits how often it is asked about {repo}; try again in {when}"
    if status >= 500:
        return f"the Hub is in trouble (status {status}) when asked about {repo}; try again later"
    said = getattr(error, "server_message", None) or ""
    quoted = f": {_quoted(first_line(error))}" if said else ""
    return f"the Hub refused what it was sent for {repo} (status {status}{quoted})"


def _asked_to_read(error: BaseException) -> bool:
    return getattr(_request(error), "method", None) in ("GET", "HEAD")


def _asked_for_pull_request(error: BaseException) -> bool:
    return re.search(r"[?&]create_pr=|/discussions\b", str(getattr(_request(error), "url", ""))) is not None


def _request(error: BaseException) -> object:
    try:
        return getattr(error, "response", None).request  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # RuntimeError: httpx, for a response without its request
        return None
