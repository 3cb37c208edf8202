"""How long the door takes: what `import timm_igkd` adds to `import timm`, and how soon the command line answers.

python benchmarks/import_times.py --rounds 7

Every measurement is a process of its own; the variants take turns, so that what else the machine does meets all of
them. Written to results/import_times.json: medians, all values, versions and hardware.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from paired import facts

from timm_igkd.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "import_times.json"
MOST_OF_TIMM = 0.1  # of the time of `import timm`, for `import timm_igkd` after it
TIMED = (
    "import time; begin = time.perf_counter(); {first}; middle = time.perf_counter(); {second}; "
    "print(middle - begin, time.perf_counter() - middle)"
)
IMPORTS = {"timm, then timm_igkd": ("import timm", "import timm_igkd"), "timm_igkd alone": ("import timm_igkd", "pass")}
ANSWERS = {
    "--help": "--help",
    "--version": "--version",
    "maps --help": "maps --help",
    "unknown command": "mapz",
    "unknown option": "preview --cout 3 --maps . --dataset digits --split s --out p",
    "missing option": "maps",
    "missing --maps": "verify --maps /no/such/store --dataset digits --split train",
    "unknown YAML key": "distill --config recipes/configs/study_check.yaml",
    "missing --maps of distill": "distill --name none --teacher-init pretrained --teacher-epochs 0 --maps /no/such",
    "missing --teacher-checkpoint": "distill --name none --teacher-init pretrained --teacher-checkpoint /no/such.pth",
    "missing --student-checkpoint": (
        "distill --name none --student resnet18 --student-init pretrained --student-checkpoint /no/such.pth"
    ),
}


def import_seconds(first: str, second: str) -> tuple[float, float]:
    code = TIMED.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    return float(before), float(after)


def answer_seconds(line: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "timm_igkd", *line.split()], capture_output=True, cwd=ROOT)
    return time.perf_counter() - begin


def summary(values: list[float]) -> dict[str, object]:
    return {"median_s": round(statistics.median(values), 4), "n": len(values), "all_s": [round(v, 4) for v in values]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (first, second) in IMPORTS.items():
            before, after = import_seconds(first, second)
            times.setdefault(f"import {name}: {first}", []).append(before)
            if second != "pass":
                times.setdefault(f"import {name}: {second}", []).append(after)
        for name, line in ANSWERS.items():
            times.setdefault(f"timm-igkd {name}", []).append(answer_seconds(line))
    results = {name: summary(values) for name, values in times.items()}
    timm, ours = (times[f"import timm, then timm_igkd: import {name}"] for name in ("timm", "timm_igkd"))
    share = statistics.median(after / before for before, after in zip(timm, ours, strict=True))
    record = {
        "share_of_timm": round(share, 4),
        "share_allowed": MOST_OF_TIMM,
        "times": results,
    } | facts()
    write_json(RESULT, record)
    for name, result in results.items():
        print(f"{result['median_s']:8.3f} s  {name}")
    print(f"import timm_igkd after timm: {100 * share:.1f} % of import timm (at most {100 * MOST_OF_TIMM:.0f} %)")


if __name__ == "__main__":
    main()
