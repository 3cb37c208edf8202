"""What nobody may see yet: the runs of a primary study before it is complete and may be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from studies.config import StudyConfig, load_study
from studies.rows import StudyRows
from timm_igkd.errors import InputError

if TYPE_CHECKING:
    from studies.results import StudyResults  # its packages are an extra, which runs do without

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).parents[1] / "results"


def refuse_shared_runs(config: StudyConfig) -> None:
    """Refuse to run a study that would train, and show, runs of another, primary one that is withheld.

    Raises:
        InputError: it plans some of them.
    """
    planned = set(config.run_ids())
    for primary in _primaries():
        shared = planned & set(primary.run_ids())
        if shared and primary.name != config.name and _is_secret(_read(primary)):
            raise InputError(
                f"{len(shared)} runs of {config.name!r} are also those of the primary study {primary.name!r}, which "
                "nobody looks at before it is complete and its file says report: true; run it then"
            )


def refuse_withheld_rows(folder: str, name: str) -> None:
    """Refuse rows of another, primary study that may not be seen yet: the reports of study `name` would show them.

    Raises:
        InputError: there are some.
    """
    for other in {row["study"] for row in StudyRows(folder).read()} - {name}:
        path = CONFIGS / f"study_{other}.yaml"
        if path.exists() and _is_secret(_read(load_study(path, f"--output_dir={folder}"))):
            raise InputError(
                f"{folder} holds runs of the primary study {other!r}, which nobody looks at before it is complete; "
                "merge them then"
            )


def withhold_shared_runs(studies: Sequence[StudyResults]) -> list[StudyResults]:
    """Return the results of studies, those that share runs with a withheld primary study marked as withheld too."""
    known = {config.name: _read(config) for config in _primaries()}
    known |= {results.config.name: results for results in studies}
    secret = {name: set(results.config.run_ids()) for name, results in known.items() if _is_secret(results)}
    marked = []
    for results in studies:
        there = set(results.run_ids())
        by = [name for name, runs in secret.items() if name != results.config.name and there & runs]
        marked.append(replace(results, withheld_by=by[0]) if by else results)
    return marked


def _primaries() -> list[StudyConfig]:
    """Return the published primary studies, with the rows of this checkout."""
    configs = (load_study(path, f"--output_dir={RESULTS / path.stem}") for path in sorted(CONFIGS.glob("study_*.yaml")))
    return [config for config in configs if config.purpose == "primary"]


def _read(config: StudyConfig) -> StudyResults:
    from studies.results import StudyResults

    return StudyResults.read(config)


def _is_secret(results: StudyResults) -> bool:
    """Say whether a primary study will claim something and does not yet; one that ended too early never will."""
    return results.is_withheld and not (results.config.ended and results.is_interim)
