"""What we need of the Hub's client touches no request of the host, and is gone afterwards, over real HTTP."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import close_session, get_session, set_client_factory

from timm_igkd.errors import RunError
from timm_igkd.hub.cache_notice import cache_use_is_told
from timm_igkd.hub.client import watched_requests
from timm_igkd.hub.errors import with_retries
from timm_igkd.hub.transport import hub_session

pytestmark = pytest.mark.hub
REPO = "user/one"


@pytest.fixture
def ask(hub):
    """Return a function that asks the Hub for a repository that is there."""
    hub.add(REPO).commit({"a.txt": b"a"})
    return lambda: HfApi().repo_info(REPO).id


@pytest.fixture
def host(ask):
    """A thread of the host's that asks the Hub, again and again: what it was told."""
    told: list[object] = []
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            try:
                told.append(ask())
            except Exception as error:
                told.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    yield told
    stop.set()
    thread.join()


def test_requests_of_another_thread_go_on_undisturbed(host, ask, capfd):
    seen: list[str] = []
    client = get_session()
    for _ in range(20):
        with (
            hub_session(20),
            cache_use_is_told("x"),
            watched_requests(lambda request: seen.append(request.url.path)),
        ):
            ask()
    while len(host) < 50:
        pass
    assert set(host) == {REPO}
    assert len(seen) == 20  # none of the host's
    assert get_session() is client
    assert capfd.readouterr().err == ""


def limits(client, of=lambda call: call()) -> list[object]:
    """Return the time-outs that requests of a client carry within and after a session."""
    found: list[object] = []

    def note(request) -> None:
        found.append(request.extensions["timeout"]["read"])

    def go() -> None:
        client.send(client.build_request("GET", hub_http.constants.ENDPOINT + "/api/whoami-v2"))

    with hub_session(7):
        client.event_hooks = client.event_hooks | {"request": [*client.event_hooks["request"], note]}
        of(go)
    of(go)
    return found


def test_time_out_ends_with_the_session(hub):
    assert limits(get_session()) == [7, None]


def test_threads_that_start_in_a_session_are_of_it_and_earlier_ones_are_not(hub):
    def in_new(call) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()

    assert limits(get_session(), in_new) == [7, None]
    close_session()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is there now
        assert limits(get_session(), lambda call: pool.submit(call).result()) == [None, None]


def test_client_that_follows_a_failed_one_has_the_time_out(hub):
    with hub_session(7):
        close_session()  # as huggingface_hub does after a connection that failed
        assert len(get_session().event_hooks["request"]) == 2
    assert len(get_session().event_hooks["request"]) == 1


def test_sessions_that_overlap_leave_the_host_as_it_was(hub, ask):
    factory, client, logger = hub_http._GLOBAL_CLIENT_FACTORY, get_session(), logging.getLogger("huggingface_hub")
    hooks, level = client.event_hooks, logger.level
    first, second = (threading.Event() for _ in range(2))

    def begun_first() -> None:
        with hub_session(5):
            first.set()
            assert second.wait(10)
            ask()

    thread = threading.Thread(target=begun_first)
    thread.start()
    assert first.wait(10)
    with hub_session(9):
        second.set()
        thread.join()  # ends first, while this one lasts
        assert logger.level == logging.ERROR
        ask()
    assert (hub_http._GLOBAL_CLIENT_FACTORY, get_session(), client.event_hooks) == (factory, client, hooks)
    assert logger.level == level


def test_factory_that_the_host_sets_meanwhile_stays(hub, ask):
    before = hub_http._GLOBAL_CLIENT_FACTORY
    mine = lambda: before()  # noqa: E731
    try:
        with hub_session(5):
            set_client_factory(mine)
            ask()
        assert hub_http._GLOBAL_CLIENT_FACTORY is mine
    finally:
        set_client_factory(before)


def test_client_closed_by_another_thread_is_asked_again(hub, ask):
    closed = [True, True, False]

    def act() -> str:
        if closed.pop(0):
            get_session().close()
            try:
                return ask()
            finally:
                close_session()
        return ask()

    assert with_retries(act, "the Hub's model", 5) == REPO
    assert closed == []
    closed = [True] * 9
    with pytest.raises(RunError, match="the Hub's model"):
        with_retries(act, "the Hub's model", 5)
