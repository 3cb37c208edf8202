"""One translator for what the Hub's client raises, whoever asked it."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from timm_igkd.errors import InputError, RunError
from timm_igkd.hub import errors as errors_module
from timm_igkd.hub.errors import hub_error, one_line_error, with_retries
from timm_igkd.hub.transport import check_repo_id


def http_error(kind: type[Exception], status: int, method: str = "GET") -> Exception:
    """Return what the client raises for an answer, whichever of its HTTP libraries it uses."""
    error = kind.__new__(kind)
    error.args = ("hf_secretsecret at https://huggingface.co/api/secret-address",)
    request = SimpleNamespace(method=method)
    error.response = SimpleNamespace(status_code=status, headers={}, request=request)  # type: ignore[attr-defined]
    return error


def wrapped(error: BaseException) -> BaseException:
    """Return an error as a library raises it that hides the first one."""
    try:
        try:
            raise error
        except BaseException as cause:
            raise RuntimeError("something went wrong") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub_errors.RepositoryNotFoundError, 404), "does not exist, or is private"),
        (http_error(hub_errors.GatedRepoError, 403), "is gated"),
        (http_error(hub_errors.RevisionNotFoundError, 404), "no such revision"),
        (http_error(hub_errors.HfHubHTTPError, 401), "refused the token"),
        (http_error(hub_errors.HfHubHTTPError, 403), "may not read"),
        (http_error(hub_errors.HfHubHTTPError, 403, "POST"), "may not write"),
        (http_error(hub_errors.HfHubHTTPError, 503), "in trouble"),
        (http_error(hub_errors.HfHubHTTPError, 402), "without payment"),
        (http_error(hub_errors.HfHubHTTPError, 409), "changed while it was pushed to; push when"),
        (http_error(hub_errors.HfHubHTTPError, 413), "maps by --shard-size"),
        (http_error(hub_errors.DisabledRepoError, 403), "is disabled on the Hub"),
        (hub_errors.OfflineModeIsEnabled("offline"), "offline mode"),
        (TimeoutError("slow"), "no answer about 'user/x'; run the same command again"),
        (ConnectionError("gone"), "check the network"),
    ],
)
def test_failure_is_one_line_without_token_or_address_also_when_wrapped(error, message):
    for raised in (error, wrapped(error)):
        found = hub_error(raised, "'user/x'")
        assert isinstance(found, RunError)
        assert message in str(found)
        assert "'user/x'" in str(found)
        assert not any(part in str(found) for part in ("secret", "https:", "\n"))


def test_what_is_not_known_is_quoted_without_token_and_address():
    error = RuntimeError("PUT https://storage/x?X-Amz-Signature=abc failed for hf_secretsecret")
    assert str(one_line_error(error, "'user/x'", 5)) == "'user/x': RuntimeError: PUT (address) failed for hf_***"


class Clock:
    """A clock that only sleep moves on; answers come to the hooks that `with_retries` sets."""

    def __init__(self, monkeypatch):
        self.now, self.slept, self.answer = 0.0, [], None
        fake = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(errors_module, "time", fake)
        monkeypatch.setattr(errors_module, "watched_requests", self.watched)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def watched(self, asked, answered):
        self.answer = answered
        return contextlib.nullcontext()


def failing(clock, error, seconds, *, answered=False):
    """Return an action that takes its time, has answers meanwhile or none, and fails."""

    def act():
        clock.now += seconds
        if answered:
            clock.answer(None)
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "seconds", "answered", "tries", "told"),
    [
        (http_error(hub_errors.HfHubHTTPError, 412), 600, True, 4, "changed while it was pushed to, 4 times;"),
        (http_error(hub_errors.HfHubHTTPError, 503), 600, True, 4, "in trouble"),
        (ConnectionError("cut"), 600, False, 4, "cannot be reached"),
        (TimeoutError("slow"), 600, True, 4, "no answer about 'user/x' within 60 s, 4 times;"),
        (TimeoutError("slow"), 301, False, 1, "no answer about 'user/x' within 60 s;"),
        (TimeoutError("slow"), 110, False, 3, "no answer about 'user/x' within 60 s, 3 times;"),
    ],
)
def test_long_work_is_tried_again_and_long_silence_is_not(monkeypatch, error, seconds, answered, tries, told):
    clock = Clock(monkeypatch)
    with pytest.raises(RunError, match=told):
        with_retries(failing(clock, error, seconds, answered=answered), "'user/x'", 60)
    assert len(clock.slept) == tries - 1


@pytest.mark.parametrize(
    ("status", "headers", "slept"),
    [
        (429, {"RateLimit": '"api";r=0;t=250'}, [250.0] * 3),
        (429, {"ratelimit": '"api";r=0;t=301'}, []),
        (429, {}, [1.0, 2.0, 4.0]),
        (503, {"Retry-After": "30"}, [30.0] * 3),
        (503, {"Retry-After": "2"}, [2.0, 2.0, 4.0]),
        (503, {"Retry-After": "3600"}, []),
    ],
)
def test_the_hub_is_asked_again_when_it_says_so(monkeypatch, capsys, status, headers, slept):
    clock = Clock(monkeypatch)
    error = http_error(hub_errors.HfHubHTTPError, status)
    error.response.headers = headers  # type: ignore[attr-defined]
    with pytest.raises(RunError) as raised:
        with_retries(failing(clock, error, 1), "'user/x'", 60)
    assert clock.slept == slept
    assert ("asks us to wait" in capsys.readouterr().err) == any(wait > 10 for wait in slept)
    if headers.get("ratelimit"):
        assert "try again in 301 s" in str(raised.value)


def test_connection_error_around_a_known_one_is_the_known_one():
    error = ConnectionError("couldn't reach it")
    error.__cause__ = hub_errors.OfflineModeIsEnabled("offline")
    assert "offline mode" in str(hub_error(error, "'user/x'"))


def test_missing_file_is_named_by_who_asks():
    error = http_error(hub_errors.RemoteEntryNotFoundError, 404)
    assert str(hub_error(error, "'user/x'", missing_file="has no weights")) == "'user/x' has no weights"


def test_bad_name_is_the_users_error():
    assert isinstance(hub_error(hub_errors.HFValidationError("a/b/c"), "'a/b/c'"), InputError)


@pytest.mark.parametrize("error", [ValueError("a"), OSError(28, "full"), json.JSONDecodeError("a", "b", 0)])
def test_what_is_not_the_hubs_is_left_to_the_caller(error):
    assert hub_error(error, "'user/x'") is None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e20])
def test_a_timeout_that_no_socket_takes_is_refused(timeout):
    with pytest.raises(InputError, match="--timeout must be above 0 and at most 86400 seconds"):
        check_repo_id("user/name", timeout)
