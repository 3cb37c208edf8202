"""What goes to the Hub beside a student's weights and card: exported files, and a result for a benchmark's page."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from timm_igkd.errors import InputError
from timm_igkd.export.record import FILES, RECORD, ExportRecord, Images, read_export_record
from timm_igkd.hub.cards import public_name
from timm_igkd.records import record_bytes
from timm_igkd.report.run_facts import RunFacts

EVAL_RESULT = ".eval_results/timm-igkd.yaml"
EXPORTS = "export/"
"""Folder of the exported files on the Hub."""
LEFT_BEHIND = frozenset({"pytorch_model.bin", EVAL_RESULT, *(EXPORTS + name for name in (RECORD, *FILES.values()))})
"""Files of other weights, where an earlier push left them and this one does not bring them; the pickle is of timm's."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def exported_files(folder: Path, weights_sha256: str, run: RunFacts) -> dict[str, bytes | Path]:
    """Return the files of a student's export by their path on the Hub; none where there is no export.

    Files other than those that the run's metrics tell of stay here, and stderr says so, as where there are none of
    those; a card of a push without any is `without_exports`.

    Args:
        folder: of the export, `export/` of a run.
        weights_sha256: of the student that is pushed, see `weights_hash`.
        run: what is known of it.

    Raises:
        MissingFileError: the record is missing. InputError: an export of other weights, or a damaged file.
    """
    if not folder.is_dir():
        if run.metrics and run.metrics.exports:
            _tell(f"the run's exported files are not pushed: there is no folder {str(folder)!r}; to push them,")
        return {}
    if not (run.metrics and run.metrics.exports):
        if not (folder / RECORD).exists():
            return {}  # a folder of that name, of something else
        if run.metrics:
            return _stays(folder, "the run tells of none")
    record = read_export_record(folder)
    if run.metrics and list(run.metrics.exports) != record.summaries():
        return _stays(folder, "the run tells of another, of the same or of other files")
    if record.weights_sha256 != weights_sha256:
        raise InputError(f"{str(folder)!r} is of other weights than the student; export it again, or delete the folder")
    files: dict[str, bytes | Path] = {f"{EXPORTS}{RECORD}": record_bytes(_without_paths(record, run))}
    for exported in record.exports:
        path = folder / FILES[exported.format]
        if not exported.is_in(folder):
            raise InputError(f"{str(path)!r} is not the file that {RECORD} names; export the student again")
        files[f"{EXPORTS}{path.name}"] = path
    return files


def _stays(folder: Path, why: str) -> dict[str, bytes | Path]:
    """Say that an export is not pushed."""
    _tell(f"the export in {str(folder)!r} stays here: {why}; to push one, delete the folder and")
    return {}


def _tell(what: str) -> None:
    print(f"warning: {what} give the run's command --export {' or '.join(FILES)}", file=sys.stderr)


def without_exports(run: RunFacts) -> RunFacts:
    """Return a run whose card tells of no exported files."""
    return run if run.metrics is None else replace(run, metrics=replace(run.metrics, exports=()))


def _without_paths(record: ExportRecord, run: RunFacts) -> ExportRecord:
    """Return a record in which models and data sets of this machine are called by their last name alone."""

    def public(images: Images) -> Images:
        if not images.dataset:
            return images
        own = images.dataset == run.dataset
        return replace(images, dataset=run.public_dataset if own else public_name(images.dataset))

    made = record.quantisation
    if made is not None:
        made = replace(made, calibrated_on=public(made.calibrated_on), compared_on=public(made.compared_on))
    return replace(record, model=public_name(record.model), verified_on=public(record.verified_on), quantisation=made)


def eval_result(run: RunFacts, task_id: str) -> bytes:
    """Return the YAML by which the Hub shows a run's top-1 accuracy on the page of its data set, a benchmark there.

    Args:
        run: with metrics.
        task_id: of the benchmark, as its eval.yaml names it.

    Raises:
        InputError: no metrics, of a part of the split, or on a data set that is not the Hub's.
    """
    if not re.fullmatch(r"\S+", task_id):
        raise InputError(f"--eval-task is the id of a task, one word, got {task_id!r}")
    if run.metrics is None:
        raise InputError(
            "--eval-task files a run's accuracy, but there is no metrics.json; push the folder of a finished run"
        )
    if run.dataset_id is None:
        raise InputError(
            f"--eval-task names a task of a data set on the Hub, and this run's is {run.public_dataset!r}; leave it out"
        )
    if run.is_tested_on_part:
        raise InputError(
            f"--eval-task needs the whole test split, and this run read {run.metrics.n} images of it; evaluate "
            "without test_limit, or leave it out"
        )
    entry = EvalResultEntry(
        dataset_id=run.dataset_id,
        task_id=task_id,
        value=round(run.metrics.top1, 2),
        dataset_revision=run.revision if _COMMIT.fullmatch(run.revision or "") else None,
        notes=f"top-1 accuracy in percent, split {run.metrics.split}, n = {run.metrics.n}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True).encode()
