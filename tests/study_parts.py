"""Synthetic studies for the tests of the report: rows with known effects, in the files that StudyRows reads."""

import csv
import json

import numpy as np

from studies.answers import answers
from studies.config import StudyConfig
from studies.paper import PARAMETERS
from studies.report import write_report
from studies.results import StudyResults
from studies.rows import COLUMNS, StudyRows
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES

TEACHER_PARAMETERS = 2_236_682
ALIGNED = "KD&IG aligned"
KD = {"distill_loss_weight": 0.01}
IG = {"overlay_prob": 0.1}
PRIMARY_CELLS = {
    "KD": KD,
    "KD&IG aligned": KD | IG,
    "KD&IG shuffled": KD | IG | {"overlay_source": "shuffled"},
    "KD&IG permuted": KD | IG | {"overlay_source": "permuted"},
    "KD&IG blank": KD | IG | {"overlay_source": "blank"},
}
PRIMARY_CONTRASTS = tuple(("KD&IG aligned", other) for other in PRIMARY_CELLS if other != "KD&IG aligned")

# a study of seconds
STUDENT = {"student": "test_resnet", "epochs": 1, "batch_size": 4, "protocol": "light"}
ARMS = {
    "Student": {},
    "KD": {"distill_loss_weight": 0.1},
    "KD&IG": {"distill_loss_weight": 0.1, "overlay_prob": 0.5},
}


def primary_study(folder, seeds=12, **settings):
    """Return the config of a primary study at 4.12x."""
    given = {
        "name": "primary",
        "title": "Primary",
        "purpose": "primary",
        "question": "Do aligned overlays help?",
        "cells": PRIMARY_CELLS,
        "base": {"drop": 5},
        "contrasts": PRIMARY_CONTRASTS,
    }
    given |= {"dataset": "data/cifar10", "teacher": "mobilenetv2_cifar", "seeds": seeds, "output_dir": str(folder)}
    return StudyConfig(**(given | settings))


def add_rows(config, gains=None, robustness=None, seed_sd=0.3, n_images=400, skip=(), measured=True, base=91.6):
    """Write a row for every planned run.

    Args:
        config: the study.
        gains: cell -> points of clean accuracy above `base`.
        robustness: cell -> points of accuracy under corruption above 70.
        seed_sd: standard deviation of a run; half of its variance is shared by the cells of a seed.
        n_images: test images.
        skip: (cell, seed) of runs that are missing.
        measured: with corruption, transfer and similarity.
        base: accuracy of a cell without gain, or cell -> accuracy.
    """
    store = StudyRows(config.output_dir)
    store.folder.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(n_images) % 10).astype(np.uint8)
    rows, arrays = [], {"labels": labels}
    for seed in config.seed_range:
        shared = np.random.default_rng(1000 + seed).normal(0, seed_sd / 2**0.5)
        for index, (name, cell) in enumerate(config.cells.items()):
            if (name, seed) in skip:
                continue
            generator = np.random.default_rng((seed, index))
            level = (base[name] if isinstance(base, dict) else base) + (gains or {}).get(name, 0.0)
            wanted = level + shared + generator.normal(0, seed_sd / 2**0.5)
            wrong = generator.permutation(n_images)[round(n_images * wanted / 100) :]
            predicted = labels.copy()
            predicted[wrong] = (predicted[wrong] + 1) % 10
            row = _row(config, name, cell, seed) | {"n_test": n_images, "top1": 100 * np.mean(predicted == labels)}
            if measured:
                row |= _extras(generator, 70 + 2 * shared + (robustness or {}).get(name, 0.0))
            rows.append(row)
            arrays[f"{row['config_hash']}-{seed}"] = predicted
    np.savez_compressed(store.predictions_path, **arrays)
    write_rows(store.path, rows)
    return store


def write_rows(path, rows):
    """Write results.csv; what a row lacks was not measured."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def edit_predictions(folder, change):
    """Replace a study's arrays, name -> values, by those that `change` returns."""
    path = StudyRows(folder).predictions_path
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez_compressed(path, **change(arrays))


def _row(config, name, cell, seed):
    parameters = PARAMETERS.get(cell.drop, 100_000)
    return {
        "study": config.name,
        "cell": name,
        "config_hash": config.run_hash(cell),
        "seed": seed,
        "commit": "abc1234",
        "hardware": "one test machine",
        "device": "cpu",
        "versions": json.dumps({"torch": "2.14", "timm": "1.0.31"}),
        "settings": "{}",
        "wall_time_s": 60.0,
        "n_train": round(50_000 * cell.subset_fraction),
        "epochs": cell.epochs,
        "data_hash": "d1",
        "teacher_hash": "t1",
        "ece": 0.04 + 0.001 * seed,
        "teacher_top1": 94.0,
        "agreement": 90.0 + 0.1 * seed,
        "num_parameters": parameters,
        "compression": TEACHER_PARAMETERS / parameters,
    }


def _extras(generator, level):
    kinds = dict(zip(CORRUPTIONS, (1, -9, -4, 2, 3, 12, 0, 8), strict=True))
    corrupted = {
        f"corruption/{kind}/{severity}": level + shift - 4 * (severity - 3) + generator.normal(0, 0.5)
        for kind, shift in kinds.items()
        for severity in SEVERITIES
    }
    per_class = {"cat": 50 + generator.normal(), "dog": 60 + generator.normal()}
    return {
        "corruption_top1": sum(corrupted.values()) / len(corrupted),
        "corruption_n": 500,
        "transfer_top1": 56.0,
        "transfer_balanced_top1": sum(per_class.values()) / 2,
        "transfer_n": 300,
        "transfer_per_class": json.dumps(per_class),
        "ig_correlation": 0.4 + 0.01 * generator.normal(),
        "ig_correlation_n": 64,
    } | corrupted


def edit_rows(folder, change):
    """Rewrite results.csv with `change(row)` applied to every row."""
    path = folder / "results.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    write_rows(path, rows)


def helpful_study(folder, skip=(), **settings):
    """Return the results of a primary study in which aligned overlays help; runs of `skip` are missing."""
    config = primary_study(folder, **settings)
    add_rows(config, {ALIGNED: 1.0}, {ALIGNED: 2.0}, skip=skip)
    return StudyResults.read(config)


def report(folder, *configs):
    """Write a report; return its Markdown and its page."""
    write_report(configs, folder / "RESULTS.md", folder / "page.html")
    return (folder / "RESULTS.md").read_text(encoding="utf-8"), (folder / "page.html").read_text(encoding="utf-8")


def said(results):
    """Return question -> what the report answers."""
    return {question: " ".join(sentences) for question, sentences in answers(results)}
