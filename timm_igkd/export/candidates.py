"""Which students are worth measuring for a budget: timm's architectures from a committed table, the teacher cut short.

The table, architectures.csv, is written by benchmarks/architectures.py.
"""

import copy
import csv
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.export.budget import Budget
from timm_igkd.models.loading import count_macs, count_parameters
from timm_igkd.models.truncation import truncate

TABLE = Path(__file__).with_name("architectures.csv")
MOST_OF_A_FAMILY = 4
_MOST_CUTS = 6  # of a teacher of many blocks, evenly spread
_BYTES = {False: 4.0, True: 1.0}  # of a parameter, in float and in int8


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        name: of timm.
        size: side of the input of its default weights, in pixels, for which `macs` are.
        parameters: without those of the classes.
        per_class: parameters of a class.
        macs: multiply-accumulates of one image.
        weights: tag of its default weights; empty: it has none.
    """

    name: str
    size: int
    parameters: int
    per_class: int
    macs: int
    weights: str


def read_architectures(path: Path = TABLE) -> list[Architecture]:
    """Return the rows of the table that the installed timm knows."""
    known, tagged = set(timm.list_models()), set(timm.list_pretrained())
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] in known]
    found = []
    for row in rows:
        name, weights = row["name"], row["weights"]
        has_weights = f"{name}.{weights}" in tagged
        numbers = {column: int(row[column]) for column in ("size", "parameters", "per_class", "macs")}
        found.append(Architecture(name=name, weights=weights if has_weights else "", **numbers))
    return found


@dataclass(frozen=True)
class Candidate:
    """A student that can be measured.

    Attributes:
        name: of timm, with the tag of its weights; of a truncation the teacher's.
        drop: entries cut from the teacher's end, 0: the architecture as it is.
        has_weights: it starts from pretrained weights, or the teacher's.
        num_parameters: with the classifier.
        macs: at the students' input size, scaled with the area from the table's.
    """

    name: str
    drop: int
    has_weights: bool
    num_parameters: int
    macs: int

    def __str__(self) -> str:
        return f"{self.name} without its last {self.drop}" if self.drop else self.name

    @property
    def family(self) -> str:
        """What its latency is like: the first letters of its name and a version, or that it is truncated."""
        if self.drop:
            return "truncated"
        found = re.match(r"(?:tf_)?([a-z]+?(?:v\d)?)(?=[\d_.]|$)", self.name)
        return found[1] if found else self.name


def candidates(
    teacher: nn.Module,
    num_classes: int,
    teacher_name: str,
    teacher_has_weights: bool,
    architectures: Sequence[Architecture] | None = None,
) -> list[Candidate]:
    """Return what is smaller than the teacher, in parameters and multiply-accumulates.

    The teacher's own architecture is none, be it smaller for having fewer classes.

    Args:
        teacher: of the input size that the students read, square.
        num_classes: of the students.
        teacher_name: of its truncations.
        teacher_has_weights: those of its truncations.
        architectures: default: the table.
    """
    side = get_model_input_config(teacher)["input_size"][-1]
    found = truncations(teacher, num_classes, teacher_name, teacher_has_weights)
    own = (getattr(teacher, "pretrained_cfg", None) or {}).get("architecture")
    for row in read_architectures() if architectures is None else architectures:
        if row.name == own:
            continue
        tag = f".{row.weights}" if row.weights else ""
        parameters = row.parameters + row.per_class * num_classes
        macs = round(row.macs * (side / row.size) ** 2)
        found.append(Candidate(row.name + tag, 0, bool(row.weights), parameters, macs))
    parameters, macs = count_parameters(teacher), count_macs(teacher)
    return [candidate for candidate in found if candidate.num_parameters < parameters and candidate.macs < macs]


def size_mb(candidate: Candidate, budget: Budget) -> float:
    """Return about what the smallest file of a candidate takes that a budget allows, in 10^6 bytes."""
    return candidate.num_parameters * _BYTES[budget.int8] / 1e6


def truncations(teacher: nn.Module, num_classes: int, name: str, has_weights: bool) -> list[Candidate]:
    """Return a teacher's truncations, none where it cannot be cut; what they cost is counted without their weights."""
    shell = copy.deepcopy(teacher).to("meta")
    found = []
    drops = range(1, len(getattr(shell, "feature_info", ())))
    for drop in drops[:: max(1, -(-len(drops) // _MOST_CUTS))]:
        try:
            with torch.device("meta"):
                student = truncate(shell, drop, num_classes).eval()
        except InputError:  # it cannot be cut, or not there
            continue
        found.append(Candidate(name, drop, has_weights, count_parameters(student), count_macs(student)))
    return found


class Chooser:
    """Says what to measure next: the best by the rule among those that are predicted to be fast enough.

    A prediction is multiply-accumulates times the median time of one in what was measured of the family, else of
    all. The rule is that of the final list, `rank`, but that truncations come first: of few parameters, they would
    seldom be reached. At most `MOST_OF_A_FAMILY` of a family are measured. Where none is predicted to be fast enough,
    the nearest comes next.

    Args:
        pool: to choose from.
        max_latency_ms: of the budget; None: everything is fast enough.
        rate: milliseconds of a multiply-accumulate, for as long as nothing is measured; the teacher's.
    """

    def __init__(self, pool: Sequence[Candidate], max_latency_ms: float | None, rate: float):
        self.left, self.limit, self.first = list(pool), max_latency_ms, rate
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.taken: Counter[str] = Counter()

    def next(self) -> Candidate | None:
        """Return what to measure next, None when nothing is left."""
        self.left = [candidate for candidate in self.left if self.taken[candidate.family] < MOST_OF_A_FAMILY]
        fast = [c for c in self.left if self.limit is None or self.predict(c) <= self.limit]
        chosen = (
            max(fast, key=lambda c: (c.drop > 0, *rank(c))) if fast else min(self.left, key=self.predict, default=None)
        )
        if chosen is not None:
            self.left.remove(chosen)
        return chosen

    def predict(self, candidate: Candidate) -> float:
        """Return the milliseconds that a candidate will take."""
        known = self.rates.get(candidate.family) or [rate for rates in self.rates.values() for rate in rates]
        return candidate.macs * statistics.median(known or [self.first])

    def learn(self, candidate: Candidate, latency_ms: float) -> None:
        """Take in what was measured of a candidate."""
        self.rates[candidate.family].append(latency_ms / candidate.macs)
        self.taken[candidate.family] += 1


def rank(candidate: Candidate) -> tuple[bool, int, int]:
    """Return what the better of two candidates, or of two measured students, has more of.

    Those with weights to start from come first, then those of more parameters, then of more multiply-accumulates. What
    accuracy they will reach, the table does not know.
    """
    return candidate.has_weights, candidate.num_parameters, candidate.macs
