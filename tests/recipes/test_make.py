"""What `make bench` and `make study` do on a fresh clone, where the committed results already are."""

import importlib
import re
import shutil
import sys

import pytest
from command_lines import RECIPES

ROOT = RECIPES.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize(("target", "options"), [("bench", ["--out"]), ("study", ["--output_dir", "--work_dir"])])
def test_targets_write_where_no_committed_result_is_and_git_looks_away(target, options):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(rf"(?m)^{target}:.*\n\t(.*)$", makefile)[1]
    found = dict(re.findall(r"(--\w+) (\S+)", command))
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    folders = [found[option].partition("/")[0] for option in options]
    assert all(f"{folder}/" in ignored or f"/{folder}/" in ignored for folder in folders), found


@pytest.mark.parametrize(
    ("script", "flag", "part", "whose"),
    [
        ("attribution", "--teachers", "cifar", "Intel(R) Xeon(R) Processor, 2 cores, commit unknown, day unknown"),
        ("map_scale", "--parts", "memory", "AMD EPYC, 2 cores, commit unknown, day unknown"),
    ],
)
def test_benchmark_says_whose_figures_its_file_holds(script, flag, part, whose, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    out = tmp_path / "result.json"
    shutil.copy(BENCHMARKS / "results" / f"{script}_cpu.json", out)
    monkeypatch.setattr(sys, "argv", [script, flag, part, "--out", str(out), "--shared", str(tmp_path)])
    importlib.import_module(script).main()
    printed = capsys.readouterr().out
    assert f"{part}: already in {out}, measured on {whose}; measure it again with --overwrite or --out" in printed
    assert script != "attribution" or f"{part}: measured on {whose}\n" in printed  # above its table


def test_facts_of_a_benchmark_name_commit_and_day(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paired = importlib.import_module("paired")
    found = paired.facts()
    assert paired.origin(found).endswith(f"cores, commit {found['commit'] or 'unknown'}, {found['date']}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    graphics = found | {"environment": found["environment"] | {"gpus": ["some GPU"]}}
    assert "cores and some GPU, commit" in paired.origin(graphics)
