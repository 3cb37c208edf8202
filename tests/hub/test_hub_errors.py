"""One translator for what the Hub's client raises, whoever asked it."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from timm_igkd.errors import InputError, RunError
from timm_igkd.hub.errors import hub_error
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
