"""Long work says that it lives, on a terminal and off one; short work prints nothing."""

import sys

import pytest
from tqdm import std
from tqdm.auto import tqdm

from timm_igkd import progress
from timm_igkd.progress import LineProgress, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """tqdm's clock, which goes on where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 30.0)
    return now


def work(clock, bar, rounds, n=1):
    for _ in range(rounds):
        clock[0] += 10
        bar.update(n)


def slowly(clock, items):
    for item in items:
        clock[0] += 10
        yield item


def test_off_a_terminal_a_line_comes_every_half_minute(clock, capsys):
    with progress_bar(total=12, desc="maps", unit="img") as bar:
        work(clock, bar, 12)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "maps:  25% 3/12 [00:30<01:30, 10.00s/img]",
        "maps:  50% 6/12 [01:00<01:00, 10.00s/img]",
        "maps:  75% 9/12 [01:30<00:30, 10.00s/img]",
        "maps: 100% 12/12 [02:00<00:00, 10.00s/img]",
    ]


def test_what_was_there_before_says_nothing_about_the_time_left(clock, capsys):
    with progress_bar(total=12, desc="maps", unit="img", initial=6) as bar:
        work(clock, bar, 3)
    assert capsys.readouterr() == ("", "maps:  75% 9/12 [00:30<00:30, 10.00s/img]\n")


def test_short_work_prints_nothing(capsys):
    assert list(progress_bar(range(5), desc="verify", unit="img")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_what_is_iterated_over_is_counted_and_more_is_told(clock, capsys):
    bar = progress_bar(range(3), desc="student", unit="step")
    bar.set_postfix(loss="1.5")
    assert list(slowly(clock, bar)) == [0, 1, 2]
    unknown = progress_bar((n for n in range(3)), desc="stream", unit="img")
    unknown.set_postfix_str("shard 2")
    list(slowly(clock, unknown))
    assert capsys.readouterr().err.splitlines() == [
        "student: 100% 3/3 [00:30<00:00, 10.00s/step, loss=1.5]",
        "stream: 3img [00:30, 10.00s/img, shard 2]",
    ]


def test_what_is_told_between_two_lines_makes_none(clock, capsys):
    with progress_bar(total=12, desc="maps", unit="img") as bar:
        work(clock, bar, 4)
        bar.set_postfix_str("shard 1")
        tqdm.write("rebuilding")
    assert capsys.readouterr() == ("rebuilding\n", "maps:  25% 3/12 [00:30<01:30, 10.00s/img]\n")


def test_a_terminal_gets_tqdms_bar(monkeypatch):
    assert isinstance(progress_bar(range(3), desc="x", unit="img"), LineProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(total=3, desc="x", unit="img", initial=1)
    assert (isinstance(bar, tqdm), bar.n, bar.initial) == (True, 1, 1)
    bar.close()


def test_nothing_is_shown_where_nothing_is_asked_for(clock, capsys):
    assert list(slowly(clock, progress_bar(range(9), desc="x", unit="img", show=False))) == list(range(9))
    assert capsys.readouterr() == ("", "")


def test_hours_are_told_as_such(clock, capsys):
    bar = progress_bar(total=2, desc="maps", unit="img")
    clock[0] += 3725
    bar.update()
    assert capsys.readouterr().err == "maps:  50% 1/2 [1:02:05<1:02:05, 3725.00s/img]\n"


def test_nothing_done_says_nothing_about_the_time_left(clock, capsys):
    with progress_bar(total=12, desc="study", unit="run", initial=2) as bar:
        work(clock, bar, 3, n=0)
    assert capsys.readouterr().err == "study:  17% 2/12 [00:30<?, ?run/s]\n"
