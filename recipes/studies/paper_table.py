"""The table of our cells beside the paper's numbers."""

import math

from scipy import stats

from studies.paper import PaperResult, paper_results
from studies.results import StudyResults
from studies.statistics import CONFIDENCE, Summary
from studies.tables import Entry, Table, number, probability, signed, span, summary_entry
from timm_igkd.report.tables import DASH


def paper_table(results: StudyResults) -> Table | None:
    """Return our cells beside the paper's numbers, or None where no cell repeats its settings."""
    rows = []
    for name in results.cells:
        ours = results.summary(name, "top1")
        for source, paper in paper_results(
            results.config, results.cell(name), results.constant(name, "num_parameters")
        ):
            entries = [summary_entry(ours, 2, ours.n), Entry(str(ours.n))]
            entries += _paper_entries(ours, paper, results.is_resampled(name))
            rows.append((f"{name} ({source})", entries))
    if not rows:
        return None
    columns = ["Ours, %", "Runs", "Paper, %", "Runs", "Ours − paper", "Welch p"]
    note = (
        "Clean top-1. The paper's code trained with maps and logits of other images, and its ablation and "
        "its compression table disagree by up to 1.4 points on the same arms."
    )
    return Table("Beside the paper's numbers", columns, rows, note)


def _paper_entries(ours: Summary, paper: PaperResult, resampled: bool) -> list[Entry]:
    """Return the paper's mean, its runs, our difference and Welch's p: for independent runs, so never for subsets."""
    difference = Entry(signed(ours.mean - paper.mean))
    n = Entry(DASH if paper.n is None else str(paper.n))
    if paper.sd is None or paper.n is None or resampled:
        sd = "" if paper.sd is None else f"sd {paper.sd:g}"
        return [Entry(number(paper.mean), sd), n, difference, Entry(DASH)]
    interval = stats.t.interval(CONFIDENCE, paper.n - 1, loc=paper.mean, scale=paper.sd / math.sqrt(paper.n))
    p = math.nan
    if ours.sd > 0:
        p = stats.ttest_ind_from_stats(
            ours.mean, ours.sd, ours.n, paper.mean, paper.sd, paper.n, equal_var=False
        ).pvalue
    return [
        Entry(number(paper.mean), f"sd {paper.sd:g}; {span(*interval)}"),
        n,
        difference,
        Entry(probability(p)),
    ]
