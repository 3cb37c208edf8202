"""What nobody may see yet: the runs of a primary study before it is complete and may be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from studies import require_report_packages
from studies.config import StudyConfig, load_study
from studies.rows import RunKey, StudyRows, key_of
from timm_igkd.errors import InputError
from timm_igkd.files import read_mapping

if TYPE_CHECKING:
    from studies.data import StudyData
    from studies.results import StudyResults  # its packages are an extra, which runs do without

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"


def refuse_shared_runs(config: StudyConfig, data: StudyData) -> None:
    """Refuse to run a study that would train, and show, runs of another, primary one that is withheld.

    They share the settings of a cell, the seed, the images and the teacher, wherever these lie.

    Args:
        config: of the study.
        data: of the study; read where settings and seeds are shared alone.

    Raises:
        InputError: it plans some of them.
    """
    for primary in _primaries():
        shared = _planned(config) & _planned(primary)
        if not shared or primary.name == config.name:
            continue
        of_primary = _read(primary)
        if _is_secret(of_primary) and (data.data_hash, data.teacher_hash or "") in _sources(of_primary):
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
    secret = {name: results for name, results in known.items() if _is_secret(results)}
    return [
        replace(results, withheld_by=next((name for name, other in secret.items() if _shows(results, other)), ""))
        for results in studies
    ]


def _shows(results: StudyResults, primary: StudyResults) -> bool:
    """Say whether rows of a study are runs of another, primary one."""
    if results.config.name == primary.config.name:
        return False
    planned, sources = _planned(primary.config), _sources(primary)
    return any(
        key_of(dict(row)) in planned and (row["data_hash"], row["teacher_hash"]) in sources for row in results.rows
    )


def _planned(config: StudyConfig) -> set[RunKey]:
    return {(config.run_hash(cell), seed) for cell in config.cells.values() for seed in config.seed_range}


def _sources(results: StudyResults) -> set[tuple[str, str]]:
    """Return the hashes of images and teacher that a study's runs are of."""
    return {(row["data_hash"], row["teacher_hash"]) for row in results.rows}


def _primaries() -> list[StudyConfig]:
    """Return the published primary studies, with the rows of this checkout."""
    found = []
    for path in sorted(CONFIGS.glob("study_*.yaml")):
        if read_mapping(path).get("purpose") == "primary":
            found.append(load_study(path, f"--output_dir={ROOT / load_study(path).output_dir}"))
    return found


def _read(config: StudyConfig) -> StudyResults:
    require_report_packages()
    from studies.results import StudyResults

    return StudyResults.read(config)


def _is_secret(results: StudyResults) -> bool:
    """Say whether a primary study will claim something and does not yet; one that ended too early never will."""
    return results.is_withheld and not (results.config.ended and results.is_interim)
