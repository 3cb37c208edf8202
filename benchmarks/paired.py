"""What the benchmarks share: rounds of alternating arms, paired ratios, and what a result was measured with."""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def alternating(arms: Sequence[str], rounds: int, measure: Callable[[str], Any], name: str) -> list[dict[str, Any]]:
    """Measure every arm in every round, and say so; the order of the arms turns with each round.

    Args:
        arms: their names.
        rounds: how many.
        measure: gives the numbers of one arm.
        name: of what is measured, for the lines that are printed.
    """
    found = []
    for index in range(rounds):
        order = arms if index % 2 == 0 else arms[::-1]
        found.append({arm: measure(arm) for arm in order} | {"first": order[0]})
        print(f"{name} round {index}: {found[-1]}", flush=True)
    return found


def summarize(ratios: Sequence[float]) -> dict[str, Any]:
    """Return median and interval of paired ratios, and with what percentage that covers the median of all rounds.

    From the k-th lowest ratio to the k-th highest: of n rounds it misses the median when fewer than k of them are on
    one side, which has the probability P(X < k) of a binomial X of n tosses, twice, whatever the ratios' distribution.
    k is the largest that covers 95 %. Below six rounds none does, and the interval is from the lowest to the highest:
    75 % of three, 93.75 % of five.
    """
    values, n = sorted(map(float, ratios)), len(ratios)
    levels = [100 * (1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n) for k in range(1, n // 2 + 1)] or [0.0]
    k = max((i for i, level in enumerate(levels) if level >= 95), default=0)
    return {
        "median": statistics.median(values),
        "interval": [values[k], values[-1 - k]],
        "level_percent": levels[k],
        "n": n,
    }


def run_child(script: Path, job: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Run `script` with a job as its only argument in a process of its own; return the JSON of its last line."""
    done = subprocess.run([sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, **options)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        return {"error": last}
    return json.loads(done.stdout.splitlines()[-1])


def commit(tree: Path = ROOT) -> str | None:
    """Return the commit of a checkout, with a + where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=tree, capture_output=True, text=True)
    return done.stdout.strip() or None


def cpu_family() -> str | None:
    """Return family and model number of the processor, which tell apart what machines for hire call by one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return f"family {values.get('cpu family')}, model {values.get('model')}"


def facts() -> dict[str, Any]:
    """Return what a result was measured with: command, commit, day, load of the last 15 minutes, versions, hardware."""
    from timm_igkd.environment import environment  # torch: a benchmark's own process may need none

    command, load = shlex.join(["python", *sys.argv]), os.getloadavg()[2]
    hardware = {"cpu_family": cpu_family(), "environment": environment()}
    return {"command": command, "commit": commit(), "date": date.today().isoformat(), "load_average": load} | hardware


def origin(found: Mapping[str, Any]) -> str:
    """Return machine, commit and day of a result with its `facts`; what early results lack is said to be unknown."""
    environment = found["environment"]
    processor = " ".join(filter(None, (environment["cpu"], found.get("cpu_family"))))
    machine = " and ".join([f"{processor}, {environment['logical_cores']} cores", *environment["gpus"]])
    return f"{machine}, commit {found.get('commit') or 'unknown'}, {found.get('date') or 'day unknown'}"
