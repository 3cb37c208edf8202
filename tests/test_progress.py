"""Long work says that it lives, on a terminal and off one; short work prints nothing."""

import sys

import pytest
from tqdm.auto import tqdm

from timm_igkd import progress
from timm_igkd.progress import LineProgress, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by itself: ten seconds a look."""
    now = [0.0]

    def look():
        now[0] += 10
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", look)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 30.0)
    return now


def test_off_a_terminal_a_line_comes_every_half_minute(clock, capsys):
    with progress_bar(total=12, desc="maps", unit="img") as bar:
        for _ in range(12):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "maps: 3 of 12 img (25 %), 0:30 gone, about 1:30 left",
        "maps: 6 of 12 img (50 %), 1:00 gone, about 1:00 left",
        "maps: 9 of 12 img (75 %), 1:30 gone, about 0:30 left",
        "maps: 12 of 12 img (100 %), 2:00 gone, about 0:00 left",
    ]


def test_what_was_there_before_says_nothing_about_the_time_left(clock, capsys):
    with progress_bar(total=12, desc="maps", unit="img", initial=6) as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr().err == "maps: 9 of 12 img (75 %), 0:30 gone, about 0:30 left\n"


def test_short_work_prints_nothing(capsys):
    assert list(progress_bar(range(5), desc="verify", unit="img")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_what_is_iterated_over_is_counted_and_more_is_told(clock, capsys):
    bar = progress_bar(range(3), desc="student", unit="step")
    bar.set_postfix(loss="1.5")
    list(bar)
    assert capsys.readouterr().err == "student: 3 of 3 step (100 %), 0:30 gone, about 0:00 left, loss 1.5\n"
    unknown = progress_bar((n for n in range(3)), desc="stream", unit="img")
    unknown.set_postfix_str("shard 2")
    list(unknown)
    assert capsys.readouterr().err == "stream: 3 img, 0:30 gone, shard 2\n"


def test_a_terminal_gets_tqdms_bar(monkeypatch):
    assert isinstance(progress_bar(range(3), desc="x", unit="img"), LineProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(total=3, desc="x", unit="img", initial=1)
    assert (isinstance(bar, tqdm), bar.n, bar.initial) == (True, 1, 1)
    bar.close()


def test_nothing_is_shown_where_nothing_is_asked_for(clock, capsys):
    assert list(progress_bar(range(9), desc="x", unit="img", show=False)) == list(range(9))
    assert capsys.readouterr() == ("", "")


def test_hours_are_told_as_such(clock, capsys):
    bar = progress_bar(total=2, desc="maps", unit="img")
    clock[0] += 3715
    bar.update()
    assert capsys.readouterr().err == "maps: 1 of 2 img (50 %), 1:02:05 gone, about 1:02:05 left\n"


def test_nothing_done_says_nothing_about_the_time_left(clock, capsys):
    with progress_bar(total=12, desc="study", unit="run", initial=2) as bar:
        for _ in range(3):
            bar.update(0)
    assert capsys.readouterr().err == "study: 2 of 12 run (17 %), 0:30 gone\n"
