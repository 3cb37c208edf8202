"""Where a study's numbers come from: data, teacher, runs that are there and missing, machines, versions."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from studies.results import StudyResults
from studies.rows import BETWEEN
from timm_igkd.report.tables import DASH, NARROW, count, duration, plain


def facts(results: StudyResults) -> list[tuple[str, str]]:
    """Return where the numbers come from: data, teacher, runs, machines, versions."""
    config, rows = results.config, results.rows
    rows_there = [
        ("Dataset", _dataset(results)),
        ("Teacher", _teacher(results)),
        ("Maps", _maps(results)),
        (
            "Runs",
            f"{len(rows)} of {results.num_planned} planned: {len(config.cells)} cells × {len(config.seed_range)} seeds",
        ),
        ("Not run" if config.ended else "Not run yet", _missing(results)),
        ("Seeds that are not whole", _partial(results.num_partial)),
        ("Failed", _failed(results)),
        (
            "Rows left out",
            f"{results.left_out}, of other settings, of seeds outside the plan, or begun after its last day"
            if results.left_out
            else "",
        ),
        ("Hardware", _distinct(row["hardware"] for row in rows)),
        ("Versions", "; ".join(_versions(text) for text in sorted({row["versions"] for row in rows}))),
        ("Commits", _commits(results)),
        ("Training", _training(results)),
        ("Remark", config.remark if rows else ""),
        ("Rows", f"{config.output_dir}/results.csv" if rows else ""),
    ]
    return [(name, text) for name, text in rows_there if text]


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(sorted({part for text in texts for part in text.split(BETWEEN) if part}))


def _partial(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'} of them, in no mean and no contrast" if number else ""


def _commits(results: StudyResults) -> str:
    """Return the commits that the runs are of; one with "+" had changes that were not committed."""
    commits = _distinct(row["commit"] for row in results.rows)
    return f"{commits} (+: with changes not in the commit)" if "+" in commits else commits


def _versions(text: str) -> str:
    return ", ".join(f"{key} {plain(value)}" for key, value in json.loads(text or "{}").items())


def _dataset(results: StudyResults) -> str:
    config = results.config
    parts = [config.dataset.rpartition("/")[2] or config.dataset]
    if results.rows:
        train = sorted({int(row["n_train"]) for row in results.rows})
        test = sorted({int(row["n_test"]) for row in results.rows if row["n_test"]})
        tested = "test" if config.evaluate_on == "test" else "validation"
        parts.append(
            f"{' or '.join(map(count, train))} training images, {' or '.join(map(count, test))} {tested} images"
        )
        parts.append(f"hash {_distinct(row['data_hash'] for row in results.rows)}")
    return ", ".join(parts)


def _teacher(results: StudyResults) -> str:
    if results.config.teacher is None:
        return "none"
    parts = [results.config.teacher, *(f"{key}={value}" for key, value in results.config.teacher_args.items())]
    accuracies = sorted({round(float(row["teacher_top1"]), 2) for row in results.rows if row["teacher_top1"]})
    if accuracies:
        parts.append(f"{' or '.join(f'{value:.2f}' for value in accuracies)}{NARROW}% top-1 on the same images")
    hashes = _distinct(row["teacher_hash"] for row in results.rows)
    return ", ".join([*parts, f"weights {hashes}"] if hashes else parts)


def _maps(results: StudyResults) -> str:
    """Return the hashes of the maps that the runs read; of one store several where processors rounded differently."""
    runs = Counter(row["maps_hash"] for row in results.rows if row["maps_hash"])
    return ", ".join(
        f"hash {name} in {number} run{'' if number == 1 else 's'}" for name, number in sorted(runs.items())
    )


def _missing(results: StudyResults) -> str:
    """Return the runs that are planned and not there, cell by cell, with ranges of seeds."""
    if not results.missing:
        return ""
    by_cell: dict[str, list[int]] = {}
    for name, seed in results.missing:
        by_cell.setdefault(name, []).append(seed)
    groups: dict[str, list[str]] = {}
    for name, seeds in by_cell.items():
        groups.setdefault(_ranges(seeds), []).append(name)
    listed = "; ".join(
        f"seed{'' if seeds.isdigit() else 's'} {seeds} of {', '.join(names)}" for seeds, names in groups.items()
    )
    number = len(results.missing)
    return f"{number} run{'' if number == 1 else 's'}: {listed}"


def _failed(results: StudyResults) -> str:
    """Return the runs that diverged or ended under the accuracy asked of a run; they are in no mean and no contrast."""
    found = [
        f"{name}, seed {seed} ({_why_failed(row)})"
        for name, runs in results.runs.items()
        for seed, row in sorted(runs.items())
        if results.is_failed(row)
    ]
    return f"{len(found)} of the runs, in no mean and no contrast: {'; '.join(found)}" if found else ""


def _why_failed(row: Mapping[str, str]) -> str:
    if epoch := row.get("diverged_epoch"):
        return f"diverged in epoch {epoch}"
    return f"top-1 {float(row['top1']):.2f}{NARROW}%"


def _ranges(seeds: list[int]) -> str:
    starts = [seeds[0], *(after for before, after in pairwise(seeds) if after != before + 1)]
    ends = [*(before for before, after in pairwise(seeds) if after != before + 1), seeds[-1]]
    return ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in zip(starts, ends, strict=True))


def _training(results: StudyResults) -> str:
    if not results.rows:
        return ""
    cells = results.config.cells.values()
    protocols = "; ".join(sorted({f"{cell.protocol}, {cell.epochs} epochs" for cell in cells}))
    total = sum(float(row["wall_time_s"]) for row in results.rows)
    return f"{protocols}; {duration(total)} in all, training and evaluation of all runs added up"
