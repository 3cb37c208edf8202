"""What a student costs against its teacher, in words: multiply-adds and warm latency, from the rows."""

import math

from studies.paper import ABLATION_DROP, PARAMETERS
from studies.results import StudyResults
from timm_igkd.report.tables import NARROW, count

PAPER_LATENCY = (
    "The paper's 140 ms and 13 ms are one cold measurement of 64 images each; "
    "its networks' multiply-adds differ by 1.50×."
)
_OF_BOTH = ("macs", "latency_ms_1", "latency_ms_64")  # measured of student and teacher


def cost_against_teacher(results: StudyResults) -> list[str]:
    """Return one sentence for each student whose teacher was measured too, the largest first; the paper's beside it."""
    found: dict[float, str] = {}
    for name in results.cells:
        parameters = results.constant(name, "num_parameters")
        sentence = _sentence(results, name)
        if sentence:
            found.setdefault(parameters, sentence)
    sentences = [found[parameters] for parameters in sorted(found, reverse=True)]
    return [*sentences, PAPER_LATENCY] if PARAMETERS[ABLATION_DROP] in found else sentences


def _sentence(results: StudyResults, name: str) -> str:
    """Return what one run measured, the lowest seed's with a latency: it holds for that run's machine alone."""
    seed = next(iter(results.values(name, "latency_ms_1")), None)
    if seed is None or not (hardware := results.runs[name][seed]["hardware"]):
        return ""
    columns = (*_OF_BOTH, *(f"teacher_{column}" for column in _OF_BOTH), "latency_threads", "num_parameters")
    found = {column: results.values(name, column).get(seed, math.nan) for column in columns}
    if any(math.isnan(value) for value in found.values()):
        return ""
    macs, one, many = ((found[column], found[f"teacher_{column}"]) for column in _OF_BOTH)
    threads = round(found["latency_threads"])
    return (
        f"{count(found['num_parameters'])} parameters, {macs[0] / 1e6:.1f}{NARROW}M multiply-adds, "
        f"{_ratio(macs)} fewer than the teacher; one image {_times(one)}, 64 images {_times(many)} "
        f"(warm medians, {hardware}, {threads} thread{'' if threads == 1 else 's'})."
    )


def _times(pair: tuple[float, float]) -> str:
    student, teacher = pair
    return f"{student:.3g}{NARROW}ms against {teacher:.3g}{NARROW}ms ({_ratio(pair)} faster)"


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[1] / pair[0]:.1f}×"
