"""Speed of a training, against a script in the style of timm's train.py, and the study's road against its past.

    python benchmarks/training.py                                    # all cases; half an hour on two CPU cores
    python benchmarks/training.py --cases plain32 --rounds 1 --images 512             # a try of a minute
    git clone . /tmp/before && git -C /tmp/before checkout 21341a0
    python benchmarks/training.py --cases study --before /tmp/before                 # joins the others in the JSON file

Cases (test_resnet, batches of 64, adamw, cosine schedule, one worker where there are workers):
    plain32   no augmentation, 32 px PNG files of CIFAR-10: `distill` with --batches workers and device
    live32    the same with a live teacher, against timm's LogitDistillationTask
    crop224   RandomResizedCrop and flip at 224 px, JPEG files of Imagenette
    study     recipes/study.py's trainer with overlay, crop and flip at 32 px, against the one of another checkout

Every arm is a process of its own; within a round they follow each other, in an order that turns with every round. A
round's speed is that of the median epoch after the first, its ratio is ours over timm's; `images_per_cpu_s` counts
the CPU time of the process and its worker, which other jobs on the machine disturb least; `first_step_s` is the time
from the start of the process to the end of the first step, imports included. On a machine that has other work, set
OMP_WAIT_POLICY=passive: torch's threads wait for each other by spinning, and take what they wait for.

Ours is the whole of `distill` up to the student: its checks of data and models, its history and its checkpoint are in
it. The script is timm's own pieces alone.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import ROOT, alternating, facts, run_child, summarize

CASES: dict[str, dict[str, Any]] = {
    "plain32": {"size": 32, "arms": ["timm", "workers", "device"], "images": 2048},
    "live32": {"size": 32, "arms": ["timm", "workers", "device"], "images": 2048, "distills": True},
    "crop224": {"size": 224, "arms": ["timm", "workers"], "images": 256, "crops": True},
    "study": {"size": 32, "arms": ["before", "now"], "images": 16384},
}
DATA = {32: ("cifar10", "image", "png"), 224: ("imagenette_small", "image", "jpg")}
BATCH, LR, DECAY = 64, 1e-3, 0.01
MEASURES = ("images_per_s", "images_per_cpu_s", "first_step_s")


# ---- the arms: each runs in a process of its own ----


class Clock:
    """Wall and CPU time at the end of every epoch, and when the first step ended.

    Args:
        steps: of an epoch.
        started: when the process was started, seconds since 1970.
    """

    def __init__(self, steps: int, started: float):
        self.steps, self.started, self.first_step_s, self.seen = steps, started, 0.0, 0
        self.marks: list[tuple[float, float]] = []

    def after_step(self) -> None:
        """Note a step."""
        self.first_step_s = self.first_step_s or time.time() - self.started
        self.seen += 1
        if self.seen % self.steps == 0:
            self.marks.append((time.perf_counter(), cpu_seconds(os.getpid())))

    def speeds(self, images: int) -> dict[str, float]:
        """Return images per second and per CPU second, medians of the epochs after the first."""
        epochs = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(self.marks)]
        wall, cpu = (images / statistics.median(times) for times in zip(*epochs, strict=True))
        return {"images_per_s": wall, "images_per_cpu_s": cpu, "first_step_s": self.first_step_s}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its living children have used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def train_with_timm(job: dict[str, Any], clock: Clock) -> None:
    """Train as timm's train.py does."""
    import torch
    from timm import utils
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask, LogitDistillationTask

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    utils.random_seed(0)
    model = create_model(job["model"], pretrained=False).to(device)
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        create_dataset("", root=job["data"], split="train", is_training=True),
        input_size=config["input_size"],
        batch_size=BATCH,
        is_training=True,
        no_aug=not job.get("crops"),
        hflip=0.5,
        color_jitter=None,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=1,
        device=device,
    )
    task: Any = ClassificationTask(model, device=device, verbose=False)
    if job.get("distills"):
        teacher = create_model(job["model"], pretrained=True)
        weights = {"distill_loss_weight": 0.5, "task_loss_weight": 0.5}
        task = LogitDistillationTask(model, teacher, temperature=2.5, **weights, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=job["epochs"], warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    updates = 0
    for _ in range(job["epochs"]):
        losses = utils.AverageMeter()
        task.train()
        for input, target in loader:
            loss = task(input, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
            losses.update(loss.item(), input.size(0))
            clock.after_step()


def train_with_distill(job: dict[str, Any], clock: Clock) -> None:
    """Train the student of a run whose teacher is given."""
    from timm_igkd.runs.job import Run
    from timm_igkd.runs.settings import RunConfig
    from timm_igkd.training.trainer import Trainer

    step = Trainer.train_step

    def noticed(*args: Any) -> Any:
        result = step(*args)
        clock.after_step()
        return result

    Trainer.train_step = noticed  # type: ignore[method-assign]
    config = RunConfig(
        output_dir=job["folder"],
        name="run",
        dataset=job["data"],
        validation_split=None,
        validation_fraction=0.0,
        teacher=job["model"],
        teacher_epochs=0,
        student=job["model"],
        overlay_prob=0.0,
        distill_loss_weight=0.5 if job.get("distills") else 0.0,
        epochs=job["epochs"],
        batch_size=BATCH,
        lr=LR,
        weight_decay=DECAY,
        warmup_epochs=0,
        min_lr=0.0,
        train_crop="rrc" if job.get("crops") else "none",
        hflip=0.5 if job.get("crops") else 0.0,
        batches=job["arm"],
        workers=1,
    )
    Run.evaluate = end  # type: ignore[method-assign]
    with contextlib.suppress(StudentTrained):
        Run(config).main()


class StudentTrained(Exception):
    """Raised where the evaluation would begin."""


def end(*args: Any) -> None:
    """End a run."""
    raise StudentTrained


def train_as_study(job: dict[str, Any], clock: Clock) -> None:
    """Train runs of a study, an epoch each, by the checkout that is imported."""
    sys.path.insert(0, str(Path(job["checkout"]) / "recipes"))
    import timm
    import torch
    from accelerate import Accelerator

    from studies import training

    try:
        from studies.cells import Cell
        from timm_igkd.overlay.device_images import DeviceImages
    except ImportError:  # before the rooms
        from timm_igkd.device_images import DeviceImages

        from studies.config import Cell

    torch.manual_seed(0)
    n, shape = job["images"], (job["images"], 3, 32, 32)
    images, maps = (torch.randint(0, 256, (n, channels, *shape[2:]), dtype=torch.uint8) for channels in (3, 1))
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = DeviceImages(images, torch.randint(0, 10, (n,)), maps).to(accelerator.device)
    cell = Cell(overlay_prob=0.1, padding=4, hflip=0.5, epochs=1, batch_size=BATCH)
    student = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    train = getattr(training, "RunTrainer", None) or training.create_trainer
    for _ in range(job["epochs"]):
        train(cell, 0, data, student, None, accelerator).fit(progress=False)
        clock.seen += clock.steps - 1
        clock.after_step()


def child(job: dict[str, Any]) -> None:
    """Run one arm and print what it measured."""
    train = {"timm": train_with_timm, "workers": train_with_distill, "device": train_with_distill}
    clock = Clock(job["images"] // BATCH, job["started"])
    train.get(job["arm"], train_as_study)(job, clock)
    print("\n" + json.dumps(clock.speeds(job["images"] // BATCH * BATCH)))


# ---- the benchmark ----


def write_images(folder: Path, shared: Path, size: int, count: int) -> None:
    """Write class folders train/ and test/ of the first images of a data set: its own JPEG bytes, or PNG."""
    from timm_igkd import load_labeled_images

    name, column, suffix = DATA[size]
    images = load_labeled_images(str(shared / "data" / name), "train")
    for index in range(count + BATCH):
        row, (image, label) = images.rows[index], images.read(index)
        path = folder / ("train" if index < count else "test") / f"class_{label}" / f"{index:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "jpg":
            path.write_bytes(row[column]["bytes"])
        else:
            image.save(path)


def write_model(folder: Path, size: int) -> str:
    """Save a test_resnet of ten classes and this input size, with random weights; return its timm name."""
    import timm
    import torch

    from timm_igkd import save_model

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, size, size)})
    save_model(model, folder, label_names=[f"class_{label}" for label in range(10)])
    return f"local-dir:{folder}"


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one case in rounds; return medians, ratios and every single number."""
    case = {**CASES[name], "images": args.images or CASES[name]["images"], "epochs": args.epochs}
    if name != "study":
        data = folder / f"images{case['size']}"
        if not data.exists():
            write_images(data, args.shared, case["size"], case["images"])
        case |= {"data": str(data), "model": write_model(folder / f"model{case['size']}", case["size"])}

    def run(arm: str) -> dict[str, Any]:
        checkout = str(args.before if arm == "before" else ROOT)
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            job = case | {"arm": arm, "folder": empty, "checkout": checkout, "started": time.time()}
            found = run_child(Path(__file__), job, env=os.environ | {"PYTHONPATH": checkout})
        if "error" in found:
            raise SystemExit(f"{name} {arm}: {found['error']}")
        return found

    base, *ours = case["arms"]
    rounds = alternating(case["arms"], args.rounds, run, name)
    waits = os.environ.get("OMP_WAIT_POLICY")
    result: dict[str, Any] = {
        "case": name,
        "omp_wait_policy": waits,
        "n_rounds": len(rounds),
        "images": case["images"],
        "epochs": args.epochs,
    }
    for what in MEASURES:
        values = {arm: [found[arm][what] for found in rounds] for arm in case["arms"]}
        result[what] = {arm: statistics.median(numbers) for arm, numbers in values.items()}
        result[f"{what}_ratio"] = {
            arm: summarize([mine / other for mine, other in zip(values[arm], values[base], strict=True)])
            for arm in ours
        }
    return result | {"rounds": rounds}


def main() -> None:
    """Measure the cases and join them in the result file."""
    from timm_igkd.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["plain32", "live32", "crop224"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, help="default: the case's")
    parser.add_argument("--before", type=Path, help="checkout that the study is compared with")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TIMM_IGKD_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_cpu.json")
    args = parser.parse_args()
    if "study" in args.cases and args.before is None:
        parser.error("study compares two checkouts; name the other by --before")
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, args, Path(folder))
        text = json.dumps(facts() | found).replace(str(args.before), "BEFORE")
        write_json(args.out, result := result | {name: json.loads(text)})
        for what in MEASURES:
            ratios = {arm: round(ratio["median"], 3) for arm, ratio in found[f"{what}_ratio"].items()}
            print(f"{name} {what}: ratios {ratios}, {found[what]}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        child(json.loads(sys.argv[1]))
    else:
        main()
