"""What a student costs against its teacher, in words: multiply-adds and warm latency, from the rows."""

import math

from studies.paper import ABLATION_DROP, PARAMETERS
from studies.results import StudyResults
from timm_igkd.report.tables import NARROW, count

PAPER_LATENCY = (
    "The paper's 140 ms and 13 ms are one cold measurement of 64 images each; "
    "its networks' multiply-adds differ by 1.50×."
)


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
    def pair(column: str) -> tuple[float, float]:
        return results.constant(name, column), results.constant(name, f"teacher_{column}")

    macs, one, many = pair("macs"), pair("latency_ms_1"), pair("latency_ms_64")
    if any(math.isnan(value) for value in (*macs, *one, *many)):
        return ""
    threads = round(results.constant(name, "latency_threads"))
    hardware = next(iter(results.runs[name].values()))["hardware"]
    return (
        f"{count(results.constant(name, 'num_parameters'))} parameters, {macs[0] / 1e6:.1f}{NARROW}M multiply-adds, "
        f"{_ratio(macs)} fewer than the teacher; one image {_times(one)}, 64 images {_times(many)} "
        f"(warm medians, {hardware}, {threads} thread{'' if threads == 1 else 's'})."
    )


def _times(pair: tuple[float, float]) -> str:
    student, teacher = pair
    return f"{student:.3g}{NARROW}ms against {teacher:.3g}{NARROW}ms ({_ratio(pair)} faster)"


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[1] / pair[0]:.1f}×"
