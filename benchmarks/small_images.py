"""Images per second of the fast small-image path against the same training through timm's loader and loop.

    python benchmarks/small_images.py                          # two CPU cores, minutes; CIFAR-10 beside the repository
    python benchmarks/small_images.py --images 50000 --batch_size 512 --compile reduce-overhead        # a GPU

The IG arm of the study: overlay with probability 0.1, crop with padding 4, flip, cross-entropy, Adam. Both ways train
the same student from the same weights on the same images; each round runs both, in alternating order, and gives one
ratio.
Writes benchmarks/results/small_images_<device>.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from paired import ROOT, alternating, facts
from timm.data import create_loader
from timm.data.transforms import ToNumpy
from timm.optim import create_optimizer_v2
from torchvision import transforms

sys.path.insert(0, str(ROOT / "recipes"))

from studies.cells import Cell
from studies.training import create_trainer
from timm_igkd import (
    IGDistillationTask,
    IGOptions,
    IGOverlay,
    IGOverlayDataset,
    compute_maps,
    load_labeled_images,
)
from timm_igkd.overlay.device_images import DeviceImages, StoredMaps, load_images

STUDENTS = {  # architecture, arguments, images on a CPU
    "test_resnet": ("test_resnet", {}, 8192),
    "mobilenetv2_cifar, drop_blocks 5": ("mobilenetv2_cifar", {"drop_blocks": 5}, 512),
}


def create_student(name: str, classes: int) -> torch.nn.Module:
    """Return a student of one input size and fixed random weights."""
    torch.manual_seed(0)
    architecture, arguments, _ = STUDENTS[name]
    overlay = {"input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return timm.create_model(architecture, num_classes=classes, pretrained_cfg_overlay=overlay, **arguments)


class Contest:
    """Both ways of training on one dataset."""

    def __init__(self, args: argparse.Namespace, images: int, maps: Path):
        self.args, self.accelerator = args, Accelerator(cpu=not torch.cuda.is_available())
        train = load_labeled_images(args.dataset, "train")
        self.dataset = train.subset(range(min(images, len(train))))
        teacher = create_student("test_resnet", train.num_classes)
        store = compute_maps(teacher.eval(), self.dataset, maps, options=IGOptions(n_steps=1), progress=False)
        assert store is not None
        self.store = store
        data = load_images(self.dataset)
        aligned = StoredMaps(store, self.dataset, data).maps("aligned", 0)
        self.data = DeviceImages(data.images, data.labels, aligned).to(self.accelerator.device)

    def cell(self, epochs: int) -> Cell:
        return Cell(overlay_prob=0.1, padding=4, hflip=0.5, epochs=epochs, batch_size=self.args.batch_size)

    def fast(self, student: torch.nn.Module) -> float:
        """Return images per second of the study's trainer."""
        parts, rate = (self.data, student, None, self.accelerator), 0.0
        for epochs in (1, self.args.epochs):  # the first is the warm-up, with the compilation
            trainer = create_trainer(self.cell(epochs), 0, *parts, compile_mode=self.args.compile)
            trainer.fit(progress=False)
            rate = trainer.images_per_s or 0.0
        return rate

    def loader(self, student: torch.nn.Module) -> float:
        """Return images per second through timm's loader, workers and prefetcher, and a plain loop of its task."""
        device, workers = self.accelerator.device, self.args.workers
        dataset = IGOverlayDataset(self.dataset, self.store, IGOverlay(0.1))
        loader = create_loader(
            dataset,
            (3, 32, 32),
            self.args.batch_size,
            is_training=True,
            num_workers=workers,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            device=device,
            persistent_workers=workers > 0,
        )
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), ToNumpy()]
        dataset.transform = transforms.Compose(steps)
        student.to(device, memory_format=torch.channels_last)
        task = IGDistillationTask(student, distill_loss_weight=0, verbose=False).train()
        optimizer = create_optimizer_v2(student, opt="adam", lr=1e-3)
        seen, started = 0, 0.0
        for epoch in range(self.args.epochs + 1):
            if epoch == 1:
                started = time.perf_counter()
            for images, labels in loader:
                with self.accelerator.autocast():
                    loss = task(images.contiguous(memory_format=torch.channels_last), labels)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen += len(labels) * (epoch > 0)
            if device.type == "cuda":
                torch.cuda.synchronize()
        return seen / (time.perf_counter() - started)

    def measure(self, name: str) -> dict[str, Any]:
        """Alternate both ways; return rates, and the ratio of each round."""

        def rate(way: str) -> float:
            return getattr(self, way)(create_student(name, self.dataset.num_classes))

        rounds = alternating(("fast", "loader"), self.args.rounds, rate, name)
        rounds = [found | {"ratio": found["fast"] / found["loader"]} for found in rounds]
        medians = {key: statistics.median(found[key] for found in rounds) for key in ("fast", "loader", "ratio")}
        spread = [float(value) for value in np.percentile([found["ratio"] for found in rounds], [0, 100])]
        return {
            "student": name,
            "images": len(self.dataset),
            "images_per_s": medians,
            "ratio_min_max": spread,
            "n_rounds": len(rounds),
            "rounds": rounds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="../shared/data/cifar10")
    parser.add_argument("--images", type=int, help="default: as many as a CPU trains in some seconds")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", default="none")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    args = parser.parse_args()
    rows = []
    for name in args.students:
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(args, args.images or STUDENTS[name][2], Path(folder) / "maps")
            rows.append(contest.measure(name))
    device = contest.accelerator.device.type
    out = ROOT / "benchmarks" / "results" / f"small_images_{device}.json"
    out.write_text(json.dumps(facts() | {"options": vars(args), "rows": rows}, indent=1) + "\n")
    for row in rows:
        rates = row["images_per_s"]
        print(
            f"{row['student']}: {rates['fast']:.0f} images/s, loader {rates['loader']:.0f}, ratio {rates['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
