"""A study's contrasts once more in some of its seeds, named in its YAML: would another choice have said the same?"""

from studies.outcomes import outcome_of
from studies.results import StudyResults
from studies.tables import Entry, Table, signed, span


def sensitivity_table(results: StudyResults) -> Table | None:
    """Return the contrasts of all outcomes in each set of seeds; None where the study names none."""
    config = results.config
    if not config.sensitivity or not config.contrasts:
        return None
    sets = {"all seeds": config.seed_range} | config.sensitivity
    rows = [
        (f"{outcome_of(column).title}: {a} − {b}", [_entry(results, a, b, column, seeds) for seeds in sets.values()])
        for column in config.outcomes
        for a, b in config.contrasts
    ]
    note = "Differences in points on common seeds with 95 % intervals, not adjusted. Nothing is claimed by them."
    return Table("Sensitivity: other sets of seeds", list(sets), rows, note)


def _entry(results: StudyResults, a: str, b: str, column: str, seeds: range | list[int]) -> Entry:
    of_a, of_b = (
        {seed: value for seed, value in results.values(cell, column).items() if seed in seeds} for cell in (a, b)
    )
    found = results.compare_runs(a, b, of_a, of_b)
    return Entry(signed(found.difference), f"{span(found.low, found.high, sign=True) or 'no interval'}; n {found.n}")
