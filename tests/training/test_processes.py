"""Two processes train the student of one with twice their batch: DDP's mean of halves is the mean of the whole."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_parts import tiny_teacher
from torch.utils.data import DataLoader
from training_parts import SETTINGS, images

from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.settings import TrainingSettings
from timm_igkd.training.trainer import Trainer

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # of the task, of the optimisation; batch norms are frozen, as theirs are statistics of a process's own half
    "teacher": ({}, {}),
    "clipped": ({}, {"clip_grad": 0.05}),
    "accumulated": ({}, {"grad_accum_steps": 2}),  # of three steps: an update of two and one of one
    "averaged": ({}, {"model_ema": True, "model_ema_decay": 0.5}),
    "adaptive": ({}, {"opt": "adamw", "lr": 0.003, "sched": "cosine"}),
    "attention": ({"attention_loss_weight": 10.0}, {}),
    "dkd": ({"loss_type": "dkd"}, {}),
}


def train(case: str, accelerator: Accelerator, batch_size: int, folder: Path) -> None:
    """Train one case and write its history and weights."""
    of_task, of_training = CASES[case]
    student, teacher = (tiny_teacher("test_resnet", classes=3, size=16, seed=seed) for seed in range(2))
    weights = {"distill_loss_weight": 0.5, "temperature": 2.0}
    task = IGDistillationTask(student, teacher, teacher_view="same", verbose=False, **weights | of_task)
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    batches = DeviceBatches(
        images(26), DeviceAugmentation(IGOverlay(0.0), padding=2, hflip=0.5), batch_size, 0, **share
    )
    settings = TrainingSettings(**SETTINGS | {"epochs": 3, "freeze_bn": True} | of_training)
    watched = images(13, 16)  # an odd number: one process gets an image again, which is not counted twice
    loader = DataLoader(list(zip(watched.images / 255, watched.labels, strict=True)), batch_size=4)
    watch = {"validation": accelerator.prepare(loader), "history_path": folder / f"{case}.csv"}
    trainer = Trainer(task, batches, settings, accelerator, **watch)
    trainer.fit(progress=False)
    if accelerator.is_main_process:
        save_file(trainer.final_model().state_dict(), folder / f"{case}.safetensors")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every case in two processes of four images a step."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", here, folder]
    paths = os.pathsep.join(str(path) for path in (here.parents[1], here.parents[2]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def read_history(path: Path) -> list[dict[str, float]]:
    """Return what each epoch computed, but for its seconds."""
    rows = csv.DictReader(path.read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value and name != "seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_student_of_one_with_twice_the_batch(case, two_processes, accelerator, tmp_path):
    train(case, accelerator, 8, tmp_path)
    halves, whole = (load_file(folder / f"{case}.safetensors") for folder in (two_processes, tmp_path))
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
    halves, whole = (read_history(folder / f"{case}.csv") for folder in (two_processes, tmp_path))
    assert len(whole) == 3
    assert all(epoch["val_top1"] * 13 / 100 == pytest.approx(round(epoch["val_top1"] * 13 / 100)) for epoch in halves)
    assert halves == [pytest.approx(epoch, rel=1e-4) for epoch in whole]


if __name__ == "__main__":
    both = Accelerator(cpu=True)
    assert both.num_processes == 2
    for name in CASES:
        train(name, both, 4, Path(sys.argv[1]))
