"""The whole method in one file: teacher, maps, overlay, distillation, on scikit-learn's digits.

    accelerate launch recipes/minimal.py                             # two CPU cores, about a minute
    accelerate launch recipes/minimal.py --teacher-epochs 1 --epochs 1 --n-steps 2 --limit 128 --out runs/try  # seconds

The digits need the extra `demo`. Resume, comparison and checks, with any images and timm models: recipes/train_igkd.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_igkd import (
    IGDistillationTask,
    IGOptions,
    IGOverlay,
    IGOverlayDataset,
    compute_maps,
    evaluate,
    load_labeled_images,
    save_model,
    truncate,
)
from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.training.accelerator import create_accelerator

SIZE, BATCH = 32, 64  # the digits' side in pixels; images of a step


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="where maps and student are kept")
    parser.add_argument("--limit", type=int, help="only the first training images, at least 2")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=15, help="of the student")
    parser.add_argument("--n-steps", type=int, default=50, help="of the integration")
    parser.add_argument("--overlay-prob", type=float, default=0.1, help="share of images overlaid; the paper's")
    return parser.parse_args(argv)


def create_transform(model: torch.nn.Module) -> transforms.Compose:
    """Return random shifts and the model's own normalisation; any transform may stand here."""
    config = timm.data.resolve_model_data_config(model)
    normalize = transforms.Normalize(config["mean"], config["std"])
    return transforms.Compose([transforms.RandomCrop(SIZE, padding=4), transforms.ToTensor(), normalize])


def fit(task: TrainingTask, dataset: IGOverlayDataset, epochs: int, accelerator: Accelerator) -> None:
    """Train the task's model: AdamW under a cosine, whole batches, or the one that fewer images make."""
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=len(dataset) > BATCH)
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    task.to(accelerator.device)
    prepared = accelerator.prepare(task.trainable_module, optimizer, loader, scheduler)
    task.trainable_module, optimizer, loader, scheduler = prepared
    task.train()
    for epoch in range(epochs):
        losses = []
        for images, labels in loader:
            loss = task(images, labels)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        accelerator.print(f"epoch {epoch + 1} of {epochs}: loss {torch.stack(losses).mean():.3f}")
    if accelerator.num_processes > 1:  # each has its own statistics of its last batch
        timm.utils.distribute_bn(task.trainable_module, accelerator.num_processes, reduce=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the method; return the student's metrics on the test split."""
    arguments = parse(argv)
    accelerator = create_accelerator((), arguments.out)
    set_seed(0)
    images = load_labeled_images("digits", "train")
    images = images.subset(range(min(arguments.limit or len(images), len(images))))

    # 1. A teacher. A real one knows the classes: timm.create_model("local-dir:runs/NAME/teacher", pretrained=True).
    cfg = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}
    teacher = timm.create_model("test_resnet", num_classes=images.num_classes, pretrained_cfg_overlay=cfg)
    plain = IGOverlayDataset(images, None)  # no maps, no overlay: only the transform
    plain.transform = create_transform(teacher)
    fit(ClassificationTask(teacher), plain, arguments.teacher_epochs, accelerator)

    # 2. Its maps of all training images, once; a second run finds them.
    maps = compute_maps(teacher, images, arguments.out / "maps", options=IGOptions(n_steps=arguments.n_steps))

    # 3. The student's images: some overlaid with their own map, before any transform.
    overlaid = IGOverlayDataset(images, maps, IGOverlay(overlay_prob=arguments.overlay_prob))
    student = truncate(teacher, 2)  # or any timm model
    overlaid.transform = create_transform(student)

    # 4. It learns from labels and the teacher's answers, by the paper's settings; on CIFAR-10 0.9 and 4 scored higher.
    task = IGDistillationTask(student, teacher, distill_loss_weight=0.01, temperature=2.5)
    fit(task, overlaid, arguments.epochs, accelerator)

    # 5. Measured once on the test split, saved, and loaded again as anyone would: import timm, import timm_igkd.
    metrics = evaluate(student, load_labeled_images("digits", "test"), teacher=teacher, measure_latency=False).metrics
    if accelerator.is_main_process:
        save_model(student, arguments.out / "student", label_names=images.class_names)
        timm.create_model(f"local-dir:{arguments.out / 'student'}", pretrained=True)
    accelerator.print(
        f"teacher {metrics['teacher']['top1']:.1f} %, student {metrics['top1']:.1f} % of {metrics['n']} images with "
        f"{metrics['compression']:.1f} times fewer parameters; saved in {arguments.out / 'student'}"
    )
    return metrics


if __name__ == "__main__":
    raise SystemExit(run_reporting_errors(main, "minimal"))
