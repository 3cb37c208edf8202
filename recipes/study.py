"""Do aligned IG overlays help? A grid of cells and seeds: train, evaluate, one row each, then the report.

    accelerate launch recipes/study.py --config recipes/configs/study_check.yaml --output_dir runs/check    # minutes
    accelerate launch --mixed_precision bf16 recipes/study.py --config recipes/configs/study_real.yaml --parallel 4
    accelerate launch recipes/study.py --config recipes/configs/study_real.yaml --merge rows_of_another_machine

Runs go seed by seed over all cells, so that wherever time ends the cells are balanced. A run whose row is there is
skipped, one that was killed goes on from its last epoch, one whose loss became NaN is a row that says so. Several of
these commands may work on one study at the same time: a run that another process has begun is left to it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from studies import require_report_packages
from studies.begun import begin, finish
from studies.cells import Cell
from studies.config import StudyConfig
from studies.data import StudyData
from studies.evaluation import RunEvaluator
from studies.rows import StudyRows
from studies.training import create_trainer
from studies.withheld import refuse_shared_runs, refuse_withheld_rows
from timm_igkd.__main__ import entry
from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.environment import environment
from timm_igkd.errors import DivergedError, InputError, RunError
from timm_igkd.evaluation.latency import describe_hardware
from timm_igkd.files import exclusive
from timm_igkd.models.loading import save_model
from timm_igkd.progress import progress_bar
from timm_igkd.runs.parsing import parse_config
from timm_igkd.training.accelerator import create_accelerator


class Study:
    """One study on one machine.

    Args:
        config: its settings.
    """

    def __init__(self, config: StudyConfig):
        self.config = config
        self.rows = StudyRows(config.output_dir, config.same_maps)
        self.marks = Path(config.work_dir) / "runs" / config.name  # by study, as several can share the maps of one
        self.accelerator = create_accelerator(config.trackers, config.work_dir)
        if self.accelerator.num_processes > 1:
            raise InputError(
                f"a run of the study is one process, the launcher started {self.accelerator.num_processes}; use "
                "--num_processes 1 and give --parallel N to the study"
            )
        self.device = self.accelerator.device
        self.data = StudyData(config, self.device)
        self.evaluator = RunEvaluator(config, self.data)

    def runs(self) -> Iterator[tuple[str, Cell, int]]:
        """Yield all planned runs, seed by seed."""
        for seed in self.config.seed_range:
            for name, cell in self.config.cells.items():
                yield name, cell, seed

    def missing(self) -> list[tuple[str, Cell, int]]:
        """Return the planned runs without a row; none of a study that ended, whose plan gets no more."""
        if self.config.ended:
            return []
        there = self.rows.run_keys()
        return [
            (name, cell, seed) for name, cell, seed in self.runs() if (self.config.run_hash(cell), seed) not in there
        ]

    def check_time(self) -> None:
        """Raise InputError after the study's last day."""
        if self.config.is_over(now := _now()):
            raise InputError(
                f"study {self.config.name!r} ended with {self.config.ends} (it is {now[:10]}, UTC), no run is begun "
                "any more; say why in its YAML (ended:) and write the report"
            )

    def run_missing(self) -> None:
        """Run what is missing, in this process."""
        if not self.missing():
            return
        self.check_time()
        self.data.prepare()
        if self.config.trackers:
            self.accelerator.init_trackers(self.config.name)
        with progress_bar(list(self.runs()), desc=self.config.name, unit="run") as bar:
            for name, cell, seed in bar:
                key = (self.config.run_hash(cell), seed)
                with exclusive(self.marks / f"{key[0]}-{seed}.lock", wait=False) as is_mine:
                    if is_mine and key not in self.rows.run_keys():
                        bar.set_postfix_str(f"{name}, seed {seed}")
                        self._run(name, cell, seed)
        self.accelerator.end_training()

    def _run(self, name: str, cell: Cell, seed: int) -> None:
        self.check_time()
        started = time.perf_counter()
        row = self._identity(name, cell, seed)
        self.rows.check(row)
        data = self.data.training_images(cell, seed)
        row |= {"n_train": len(data), "n_left_out": self._num_available() - len(data), "epochs": cell.epochs}
        student = self.data.create_student(cell, seed)
        checkpoint = self.marks / f"{row['config_hash']}-{seed}.pt"
        begun = begin(checkpoint, row, self.config.same_maps)
        row |= begun.columns
        predictions = None
        trainer = create_trainer(
            cell,
            seed,
            data,
            student,
            self.data.teacher,
            self.accelerator,
            compile_mode=self.config.compile,
            checkpoint=checkpoint,
            label=f"{name}-{seed}",
        )
        try:
            row["train_loss"] = trainer.fit()[-1].loss
            trained = trainer.final_model()
            metrics, answers = self.evaluator.evaluate(trained, cell)
        except DivergedError as error:
            tqdm.write(f"{name}, seed {seed}: {error}")
            row["diverged_epoch"] = error.epoch
        else:
            if trainer.images_per_s is not None:
                row["train_images_per_s"] = round(trainer.images_per_s, 1)
            row |= {key: json.dumps(value) if isinstance(value, dict) else value for key, value in metrics.items()}
            predictions = answers.numpy()
            if cell.save:
                save_model(trained.half(), self.rows.folder / "students" / f"{row['config_hash']}-{seed}")
        self.accelerator.free_memory()  # it keeps every optimizer, and with it every student
        row["wall_time_s"] = round(begun.trained_s + time.perf_counter() - started, 2)
        self.rows.add(row, predictions, self.data.test.images.labels.cpu().numpy())
        finish(checkpoint)

    def _num_available(self) -> int:
        """Return how many images of the training split no run is evaluated on."""
        held_out = len(self.data.test.images) if self.config.evaluate_on == "validation" else 0
        return len(self.data.train) - held_out

    def _identity(self, name: str, cell: Cell, seed: int) -> dict[str, Any]:
        versions = environment()
        kept = ("timm_igkd", "python", "torch", "timm", "captum", "torch_threads", "bfloat16")
        return {
            "study": self.config.name,
            "cell": name,
            "config_hash": self.config.run_hash(cell),
            "seed": seed,
            "commit": commit(),
            "hardware": describe_hardware(self.device),
            "device": self.device.type,
            "versions": json.dumps(
                {key: versions[key] for key in kept if key in versions}
                | {"precision": self.accelerator.mixed_precision, "compile": self.config.compile}
            ),
            "settings": json.dumps(self.config.settings(cell)),
            "started": _now(),
            "data_hash": self.data.data_hash,
            "teacher_hash": self.data.teacher_hash,
            "transfer_hash": self.data.transfer_hash,
        } | self.data.maps_identity(cell)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """Return the commit of this checkout, with "+" where files were changed since; "unknown" outside of one.

    TIMM_IGKD_COMMIT names it where the files were copied without their history.
    """
    if named := os.environ.get("TIMM_IGKD_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def run_in_parallel(config: StudyConfig, argv: list[str], rows: StudyRows) -> None:
    """Run the same command in several processes, which share the runs among them, and show the progress of all.

    Raises:
        RunError: one of them failed; the others are stopped, what they finished is kept.
    """
    command = [sys.executable, __file__, *argv, "--parallel=1", "--report=false", "--merge", "--rows_of"]
    threads = max(1, (os.cpu_count() or 1) // config.parallel)
    workers = [
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}) for _ in range(config.parallel)
    ]
    planned = {(config.run_hash(cell), seed) for cell in config.cells.values() for seed in config.seed_range}
    try:
        with progress_bar(total=len(planned), desc=config.name, unit="run") as bar:
            while any(worker.poll() is None for worker in workers):
                if any(worker.poll() for worker in workers):
                    raise RunError("a process of the study failed, see above; the same command goes on from its rows")
                bar.update(len(planned & rows.run_keys()) - bar.n)
                time.sleep(2)
        if any(worker.returncode for worker in workers):
            raise RunError("a process of the study failed, see above; the same command goes on from its rows")
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()


def write_page(config: StudyConfig) -> Path:
    """Write RESULTS.md and index.html of one study beside its rows; return the page."""
    from studies.report import write_report  # only here: its packages are an extra

    folder = Path(config.output_dir)
    write_report([config], folder / "RESULTS.md", folder / "index.html")
    return folder / "index.html"


def main(argv: list[str] | None = None) -> int:
    """Run the study; bad input is one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv

    def run() -> None:
        keep_freed_memory()
        config = parse_config(StudyConfig, arguments, description=__doc__)
        if config.report:
            require_report_packages()
        for folder in (*config.rows_of, *config.merge):
            refuse_withheld_rows(folder, config.name)
        study = Study(config)
        refuse_shared_runs(config, study.data)
        if config.ended:
            print(f"study {config.name!r} ended ({config.ended}): no run is begun any more")
        planned = {(config.run_hash(cell), seed) for _, cell, seed in study.runs()}
        for folder in config.rows_of:
            print(f"taken over {study.rows.merge(folder, planned)} runs of {folder}")
        for folder in config.merge:
            print(f"merged {study.rows.merge(folder)} runs of {folder}")
        if not study.missing():
            if not config.ended:
                print(f"all {len(list(study.runs()))} runs of study {config.name!r} have a row; nothing to train")
        elif config.parallel > 1:
            study.check_time()
            study.data.prepare()
            torch.cuda.empty_cache()  # for the processes that share the device
            run_in_parallel(config, list(arguments), study.rows)
        else:
            study.run_missing()
        if config.report:
            print(f"report: {write_page(config)}")

    return run_reporting_errors(run, "study")


if __name__ == "__main__":
    entry(main)
