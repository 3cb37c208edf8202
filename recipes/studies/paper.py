"""The paper's numbers, and which of our cells repeat its settings.

Source: arXiv 2506.14440 and the authors' repository: nordlinglab/ModelCompression-IntegratedGradients, commit c534787.
"""

import math
from typing import NamedTuple

from scipy import stats

from studies.cells import Cell
from studies.config import StudyConfig
from studies.statistics import CONFIDENCE, Interval

NUM_RUNS = 10  # of each arm of the ablation

# Entries removed from the teacher's end -> parameters left (of 2,236,682).
PARAMETERS = {
    3: 1_019_402,
    5: 543_498,
    7: 306_954,
    9: 185_738,
    11: 77_194,
    13: 40_970,
    15: 16_042,
    17: 1_994,
}


class PaperResult(NamedTuple):
    """CIFAR-10 test accuracy in percent; sd and n where the paper tells them."""

    mean: float
    sd: float | None = None
    n: int | None = None
    best: float | None = None


ABLATION_DROP = 5
ABLATION = {
    "Student": PaperResult(91.18, 0.305, NUM_RUNS, 91.50),
    "KD": PaperResult(91.62, 0.435, NUM_RUNS, 92.29),
    "IG": PaperResult(91.35, 0.323, NUM_RUNS, 92.01),
    "AT": PaperResult(91.16, 0.321, NUM_RUNS, 91.58),
    "KD&IG": PaperResult(92.02, 0.340, NUM_RUNS, 92.58),
    "KD&AT": PaperResult(91.75, 0.286, NUM_RUNS, 92.20),
    "IG&AT": PaperResult(91.47, 0.235, NUM_RUNS, 91.84),
    "KD&IG&AT": PaperResult(91.86, 0.279, NUM_RUNS, 92.42),
}

# By entries removed: (Student, KD, KD&IG, IG), one mean each; the paper does not tell of how many runs.
_COMPRESSION_ARMS = ("Student", "KD", "KD&IG", "IG")
_COMPRESSION = {
    3: (90.94, 91.21, 91.67, 90.91),
    5: (90.42, 90.71, 90.66, 90.46),
    7: (90.63, 90.20, 91.06, 90.16),
    9: (89.71, 89.68, 90.00, 90.06),
    11: (87.88, 87.95, 87.26, 87.00),
    13: (84.09, 84.00, 84.79, 84.27),
    15: (76.01, 76.80, 76.44, 75.45),
    17: (55.44, 54.75, 54.79, 55.22),
}
COMPRESSION = {
    (arm, drop): PaperResult(value)
    for drop, values in _COMPRESSION.items()
    for arm, value in zip(_COMPRESSION_ARMS, values, strict=True)
}

SUBSET_FRACTION = 0.8
MONTE_CARLO = {
    "Student": PaperResult(90.05, 0.34, 60),
    "KD": PaperResult(90.65, 0.34, 60),
    "KD&IG": PaperResult(91.29, 0.55, 60),
    "KD&IG&AT": PaperResult(90.89, 0.30, 60),
}


def paper_gap() -> Interval:
    """Return KD&IG minus KD in the paper's ablation, with Welch's 95 % interval from its means and deviations."""
    ours, theirs = ABLATION["KD&IG"], ABLATION["KD"]
    assert ours.sd is not None  # the paper tells both
    assert theirs.sd is not None
    squares = ours.sd**2 / NUM_RUNS, theirs.sd**2 / NUM_RUNS
    freedom = sum(squares) ** 2 / sum(square**2 / (NUM_RUNS - 1) for square in squares)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(squares))
    gap = ours.mean - theirs.mean
    return Interval(gap, gap - half, gap + half)


def arm_name(cell: Cell) -> str:
    """Return the paper's name of a cell's arm, from its weights and probabilities; E and other maps are none of its."""
    parts = (
        ("KD", cell.distill_loss_weight > 0),
        ("IG" if cell.map_method == "ig" else cell.map_method, cell.overlay_prob > 0),
        ("AT", cell.attention_loss_weight > 0),
        ("E", cell.explanation_loss_weight > 0),
    )
    return "&".join(name for name, is_used in parts if is_used) or "Student"


def repeats_paper(config: StudyConfig, cell: Cell, num_parameters: float) -> bool:
    """Say whether a cell repeats the paper's training: its student, protocol, epochs and data.

    Maps and logits may be aligned or shuffled: the paper means aligned ones, its code shuffled both.
    """
    dataset = config.dataset.lower().replace("-", "").replace("_", "")
    return (
        PARAMETERS.get(cell.drop) == num_parameters
        and (cell.protocol, cell.epochs, cell.batch_size, cell.opt, cell.lr) == ("paper", 100, 64, "adam", 1e-3)
        and (cell.overlay_prob == 0 or cell.overlay_source in ("aligned", "shuffled"))
        and (cell.overlay_prob == 0 or (cell.overlay_weight, cell.overlay_max_power) == (0.5, 2))
        and cell.attention_loss_weight in (0, 0.8)
        and cell.explanation_loss_weight == 0
        and (cell.overlay_prob == 0 or cell.map_method == "ig")
        and cell.overlay_prob in (0, 0.1)
        and cell.distill_loss_weight in (0, 0.01)
        and (cell.temperature == 2.5 or cell.distill_loss_weight == 0)
        and config.train_limit is None
        and config.test_limit is None
        and config.evaluate_on == "test"
        and "cifar10" in dataset
        and "cifar100" not in dataset
    )


def paper_results(config: StudyConfig, cell: Cell, num_parameters: float) -> list[tuple[str, PaperResult]]:
    """Return (which table of the paper, its result) for a cell; empty where the paper has no such run."""
    if not repeats_paper(config, cell, num_parameters):
        return []
    arm = arm_name(cell)
    if cell.subset_fraction < 1:
        found = MONTE_CARLO.get(arm) if cell.subset_fraction == SUBSET_FRACTION and cell.drop == ABLATION_DROP else None
        return [("Monte Carlo, 80 % subsets", found)] if found else []
    tables = []
    if cell.drop == ABLATION_DROP:
        tables.append((f"ablation, {NUM_RUNS} runs", ABLATION[arm]))
    if (arm, cell.drop) in COMPRESSION:
        tables.append(("by compression", COMPRESSION[arm, cell.drop]))
    return tables
