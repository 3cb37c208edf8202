"""The columns of results.csv that a report shows, and how."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """A column of results.csv as the report shows it."""

    column: str
    title: str
    short: str
    unit: str
    digits: int


OUTCOMES = {
    outcome.column: outcome
    for outcome in (
        Outcome("top1", "Clean accuracy", "Clean", "%", 2),
        Outcome("corruption_top1", "Accuracy under corruption", "Corrupted", "%", 2),
        Outcome("transfer_balanced_top1", "Transfer accuracy, balanced", "Transfer, balanced", "%", 2),
        Outcome("transfer_top1", "Transfer accuracy", "Transfer", "%", 2),
        Outcome("top5", "Clean top-5 accuracy", "Top-5", "%", 2),
        Outcome("loss", "Cross-entropy", "Cross-entropy", "nats", 3),
        Outcome("ece", "Calibration error (ECE)", "ECE", "", 3),
        Outcome("agreement", "Same answer as the teacher", "Teacher agreement", "%", 2),
        Outcome("teacher_kl", "KL divergence from the teacher", "Teacher KL", "nats", 3),
        Outcome("ig_correlation", "Correlation of IG maps with the teacher's", "IG similarity", "", 3),
    )
}


PERCENTAGES = tuple(name for name, outcome in OUTCOMES.items() if outcome.unit == "%")
"""What a study can name as outcomes: columns in percent, of which more is better; their differences are points."""


def outcome_of(column: str) -> Outcome:
    """Return how a column is shown; an unknown one is shown under its own name."""
    return OUTCOMES.get(column, Outcome(column, column, column, "", 3))
