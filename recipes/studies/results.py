"""What a study has measured: rows that belong to its cells, their summaries and contrasts; every reported number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from studies.cells import Cell
from studies.config import StudyConfig
from studies.contrast import ALPHA, Contrast
from studies.resampling import compare_subsets, summarize_subsets, two_level_bootstrap
from studies.rows import StudyRows
from studies.statistics import (
    NAN,
    Comparison,
    Interval,
    Summary,
    compare_paired,
    equivalence,
    holm,
    pair_by_seed,
    paired_power,
    seeds_needed,
    summarize,
)
from timm_igkd.errors import InputError

LEAST_SEEDS = 6  # of every cell, for a primary study that ended early to claim anything
TIES = 0.1  # points by which accuracy can differ between two ways to break ties of low-precision logits
DIFFERENCE = 0.4  # points: what the paper found between KD&IG and KD; power is told for it


@dataclass(frozen=True)
class StudyResults:
    """Rows of a study's output folder, held against its config.

    A run belongs to the cell whose settings hash to its config_hash, whatever the cell was called when it ran.

    Attributes:
        runs: cell -> seed -> row (text), planned seeds only.
        left_out: rows of other settings, of seeds outside the plan, or begun after the study's last day.
        num_partial: runs of an ended study whose seed is not there in every cell; they do not count.
        withheld_by: name of a primary study that it shares runs with and of which nothing may be seen yet; empty: none.
    """

    config: StudyConfig
    runs: Mapping[str, Mapping[int, Mapping[str, str]]]
    left_out: int
    num_partial: int = 0
    withheld_by: str = ""

    @classmethod
    def read(cls, config: StudyConfig) -> "StudyResults":
        """Read what is there; no file means no run yet.

        Raises:
            InputError: a CSV of another form.
        """
        rows = StudyRows(config.output_dir).read()
        hashes = {name: config.run_hash(cell) for name, cell in config.cells.items()}
        planned = [row for row in rows if int(row["seed"]) in config.seed_range and not config.is_over(row["started"])]
        runs = {
            name: {int(row["seed"]): row for row in planned if row["config_hash"] == run_hash}
            for name, run_hash in hashes.items()
        }
        count = there = sum(map(len, runs.values()))
        if config.ended:  # only whole seeds count: the cells stay balanced
            whole = set.intersection(*(set(of_cell) for of_cell in runs.values()))
            runs = {name: {seed: row for seed, row in of.items() if seed in whole} for name, of in runs.items()}
            count = sum(map(len, runs.values()))
        return cls(config, runs, len(rows) - there, there - count)

    @property
    def cells(self) -> list[str]:
        """Cells with at least one run, in the order of the config."""
        return [name for name, runs in self.runs.items() if runs]

    @property
    def rows(self) -> list[Mapping[str, str]]:
        """All rows that belong to the study, cell by cell, seed by seed."""
        return [runs[seed] for runs in self.runs.values() for seed in sorted(runs)]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Planned runs without a row, as (cell, seed)."""
        return [(name, seed) for name, runs in self.runs.items() for seed in self.config.seed_range if seed not in runs]

    @property
    def num_planned(self) -> int:
        return len(self.config.cells) * len(self.config.seed_range)

    def cell(self, name: str) -> Cell:
        """Return the settings of a cell."""
        return self.config.cells[name]

    def values(self, cell: str, column: str) -> dict[int, float]:
        """Return seed -> number of one column, of measured runs that did not fail."""
        texts = {seed: row.get(column, "") for seed, row in sorted(self.runs[cell].items()) if not self.is_failed(row)}
        return {seed: _number(column, text) for seed, text in texts.items() if text != ""}

    def is_failed(self, row: Mapping[str, str]) -> bool:
        """Say whether a run diverged, or ended under the accuracy that the plan asks of a run."""
        if row.get("diverged_epoch"):
            return True
        return row["top1"] != "" and not float(row["top1"]) >= self.config.failed_below  # NaN is failed, too

    def constant(self, cell: str, column: str) -> float:
        """Return the value of a column that does not depend on the seed, e.g. parameters; NaN: not measured."""
        return next(iter(self.values(cell, column).values()), NAN)

    def is_measured(self, column: str) -> bool:
        """Say whether any run has a number in the column."""
        return any(self.values(cell, column) for cell in self.cells)

    def resample_sizes(self, cell: str) -> tuple[int, int]:
        """Return how many images of the training set the runs of a cell left out, and how many they were trained on.

        The fraction alone does not tell: a subset is stratified, so its size is rounded class by class.
        """
        n_train, n_left_out = (self.constant(cell, column) for column in ("n_train", "n_left_out"))
        if math.isnan(n_left_out):  # rows from before they said it
            n_left_out = (self.config.train_limit or n_train / self.cell(cell).subset_fraction) - n_train
        return round(n_left_out), round(n_train)

    def is_resampled(self, cell: str) -> bool:
        """Say whether the runs of a cell are Monte Carlo subsets of one training set."""
        return self.cell(cell).subset_fraction < 1

    def summary(self, cell: str, column: str) -> Summary:
        """Return mean, sd and interval of a cell; Monte Carlo runs get the corrected variance."""
        values = np.array(list(self.values(cell, column).values()))
        return summarize_subsets(values, *self.resample_sizes(cell)) if self.is_resampled(cell) else summarize(values)

    def compare(self, a: str, b: str, column: str) -> Comparison:
        """Compare two cells in one column on their common seeds."""
        return self.compare_runs(a, b, self.values(a, column), self.values(b, column))

    def compare_runs(self, a: str, b: str, of_a: Mapping[int, float], of_b: Mapping[int, float]) -> Comparison:
        """Compare two cells in any number of their runs, seed -> value, on common seeds."""
        first, second = pair_by_seed(of_a, of_b)
        if len(first) and (self.is_resampled(a) or self.is_resampled(b)):
            return compare_subsets(first, second, *self.resample_sizes(a if self.is_resampled(a) else b))
        return compare_paired(first, second)

    def differences(self, a: str, b: str, column: str) -> np.ndarray:
        """Return a - b on common seeds, [n] float64."""
        first, second = pair_by_seed(self.values(a, column), self.values(b, column))
        return first - second

    @cached_property
    def _contrasts(self) -> dict[str, list[Contrast]]:
        return {}

    def contrasts(self, column: str) -> list[Contrast]:
        """Return the contrasts named in advance in one outcome, with Holm's p over all of them."""
        if column not in self._contrasts:
            found = [self.compare(a, b, column) for a, b in self.config.contrasts]
            adjusted = holm(np.array([comparison.p for comparison in found]))
            contrasts = [
                self._contrast(a, b, column, comparison, float(p))
                for (a, b), comparison, p in zip(self.config.contrasts, found, adjusted, strict=True)
            ]
            within = holm(np.array([contrast.equivalence.p if contrast.equivalence else NAN for contrast in contrasts]))
            self._contrasts[column] = [
                contrast._replace(equivalence_holm_p=float(p)) for contrast, p in zip(contrasts, within, strict=True)
            ]
        return self._contrasts[column]

    @property
    def is_interim(self) -> bool:
        """Whether planned runs are missing and the study has not been declared ended: then nothing is claimed.

        Nor is it of a study that ended before its cells had LEAST_SEEDS runs each.
        """
        return bool(self.missing) and (not self.config.ended or min(map(len, self.runs.values())) < LEAST_SEEDS)

    @property
    def is_withheld(self) -> bool:
        """Whether nothing of it may be seen yet.

        Of a primary study that is not complete, or whose file says report: false; and of one that shares its runs.
        """
        is_closed = self.config.purpose == "primary" and (self.is_interim or not self.config.report)
        return is_closed or bool(self.withheld_by)

    def spread(self, column: str) -> float:
        """Return the sd of the paired differences of one outcome, pooled over the contrasts named in advance.

        It is the root of the mean of their variances, and says nothing of the differences themselves.

        Raises:
            InputError: runs are missing, another outcome of a primary study than its first, or no contrast has two
                common seeds.
        """
        if self.config.purpose == "primary" and column != self.config.outcomes[0]:
            raise InputError(f"a primary study's blind look is at {self.config.outcomes[0]} alone, got {column}")
        if self.missing:
            raise InputError(
                f"{len(self.missing)} of {self.num_planned} runs are missing; the spread is of all of them"
            )
        found = [self.compare(a, b, column).sd ** 2 for a, b in self.config.contrasts]
        if not found or any(math.isnan(variance) for variance in found):
            raise InputError(
                f"study {self.config.name!r} has no contrasts of two seeds and more; name some, or run more"
            )
        return math.sqrt(sum(found) / len(found))

    def effect_of_interest(self, column: str) -> float | None:
        """Return the points that the power is told for: the study's smallest effect.

        A study that names none is told what the paper found, in clean accuracy; one that names some, nothing of others.
        """
        if self.config.smallest_effect:
            return self.config.smallest_effect.get(column)
        return DIFFERENCE if column == "top1" else None

    def _contrast(self, a: str, b: str, column: str, comparison: Comparison, holm_p: float) -> Contrast:
        if self.is_resampled(a) or self.is_resampled(b):  # the power of the paired test is not that of the corrected
            return Contrast(a, b, comparison, holm_p, NAN, NAN)
        wanted, bound = self.effect_of_interest(column), self.config.smallest_effect.get(column)
        if wanted is None:
            return Contrast(a, b, comparison, holm_p, NAN, NAN)
        power, strict_power = (
            paired_power(comparison.sd, comparison.n, wanted, alpha)
            for alpha in (ALPHA, ALPHA / len(self.config.contrasts))
        )
        needed = seeds_needed(comparison.sd, wanted, ALPHA)
        within = None if bound is None else equivalence(self.differences(a, b, column), bound, ALPHA)
        return Contrast(a, b, comparison, holm_p, power, needed, strict_power, within, wanted=wanted)

    def bootstrap(self, a: str, b: str) -> Interval | None:
        """Return a - b of clean accuracy with the interval over seeds and test images.

        None where there are no two common seeds, and for Monte Carlo subsets, which are no independent draws.

        Raises:
            MissingFileError: predictions of a run are not beside its row.
            InputError: predictions that do not give the accuracy of their row.
        """
        seeds = sorted(self.values(a, "top1").keys() & self.values(b, "top1").keys())
        if len(seeds) < 2 or self.is_resampled(a) or self.is_resampled(b):
            return None
        return two_level_bootstrap(self._correct(a, seeds), self._correct(b, seeds))

    def _correct(self, cell: str, seeds: list[int]) -> np.ndarray:
        """Return [seeds, images] bool from the predictions, checked against the rows."""
        store, run_hash = StudyRows(self.config.output_dir), self.config.run_hash(self.cell(cell))
        labels, top1 = store.labels(), self.values(cell, "top1")
        correct = []
        for seed in seeds:
            predicted = store.predictions((run_hash, seed))
            if predicted.shape != labels.shape:
                raise InputError(
                    f"predictions {run_hash}-{seed} have shape {predicted.shape}, expected that of the labels, "
                    f"{labels.shape}; restore them or delete the run's row and repeat it"
                )
            correct.append(predicted == labels)
            found = 100 * correct[-1].mean()
            if abs(found - top1[seed]) > TIES:
                raise InputError(
                    f"predictions {run_hash}-{seed} give {found:.3f} % top-1, their row says {top1[seed]:.3f} %; "
                    "restore them or delete the row and repeat the run"
                )
        return np.stack(correct)


def _number(column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"column {column!r} of results.csv must hold numbers, found {text!r}; repair the row"
        ) from error
