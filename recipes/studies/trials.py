"""Hyperparameters chosen on validation images: of every arm's trials the one with the highest mean."""

from studies.outcomes import outcome_of
from studies.results import StudyResults
from studies.tables import Entry, Table, number


def trials_table(results: StudyResults) -> Table | None:
    """Return every arm's best trial by its mean over seeds, or None where nothing is chosen on validation images.

    An arm is a cell of the YAML, its trials are the combinations of that cell's grid. Where no cell has a grid, the
    cells themselves are the trials, all of one arm.
    """
    if results.config.evaluate_on != "validation" or len(results.config.cells) < 2:
        return None
    column = results.config.outcomes[0]
    have_grids = any(", " in name for name in results.config.cells)
    arms: dict[str, dict[str, float]] = {}
    for name in results.cells:
        arm, _, setting = name.partition(", ") if have_grids else ("All cells", "", name)
        if results.values(name, column):
            arms.setdefault(arm, {})[setting] = results.summary(name, column).mean
    if not arms:
        return None
    rows = []
    for arm, trials in arms.items():
        best = max(trials, key=lambda setting: trials[setting])
        means = Entry(number(trials[best])), Entry(number(min(trials.values())))
        rows.append((arm, [Entry(str(len(trials))), Entry(best), *means]))
    title = outcome_of(column)
    columns = ["Trials", "Best setting", f"Its mean, {title.unit}", "Worst trial's mean"]
    note = "Means over seeds on validation images; the best of several trials is an optimistic number."
    return Table(f"{title.title} by arm: the best trial", columns, rows, note)
