"""From images to a student: this package's way against the paper's, and the study's road against its bare passes.

    python benchmarks/pipeline.py --rounds 3                 # half an hour on two CPU cores
    python benchmarks/pipeline.py --rounds 1 --scale 0.1     # a try of three minutes

Teacher and student are those of recipes/configs/study_real.yaml. Parts, each a process of its own, in an order that
turns with every round:
    maps        `timm-igkd maps --n-steps auto --logits`, written to disk; minutes of all images from its rate
    logits      `timm-igkd maps --method none`: what distillation without an overlay needs
    training    the study's trainer in the protocol `fast`, KD from stored logits and overlays of every tenth image, in
                bfloat16 where the processor has it; `overhead`: its epoch over the same number of bare forward and
                backward passes of that precision, one after each step: a machine's speed changes
    float32     the same in float32, where `training` is not
    wide        as `training`, of the student of recipes/configs/cifar10_student_wide.yaml and without an overlay
    captum      captum's call with default arguments, 50 steps, 8 images at a time, and the teacher's logits
    authors     the paper's settings: batches of 64 from a DataLoader with two workers over decoded PIL images, Adam,
                NCHW, stored logits; 100 epochs from the rate
    captum_mobilenetv2, authors_mobilenetv2
                the same with the paper's own networks: mobilenetv2_cifar whole as teacher, without its last five
                entries as student; random weights, as time alone is measured
    logits_mobilenetv2
                that teacher's logits alone, 64 images at a time

CIFAR-10 lies beside the repository. All ways count 50,000 images; none counts the training of its teacher, evaluation,
or what reads store and images before the first epoch:
    ours               maps, then 10 epochs with the overlay, as the study trains
    ours_wide          logits, then the 60 epochs of cifar10_student_wide.yaml: distillation alone
    paper              the paper's way with the study's networks
    paper_networks     the paper's way with its own
    paper_networks_kd  its distillation alone: logits, then its epochs
What accuracy each reaches is not measured here. Writes benchmarks/results/pipeline_<device>.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import ROOT, alternating, facts, run_child, summarize

sys.path.insert(0, str(ROOT / "recipes"))

IMAGES, STEPS = 50_000, 50
EPOCHS_TIMED = 4
SIZES = {  # images a round and part
    **{"maps": 1024, "logits": 8_192, "training": 20_480, "float32": 20_480, "wide": 10_240},
    **{"captum": 32, "authors": 3_200},
    **{"captum_mobilenetv2": 32, "logits_mobilenetv2": 1_024, "authors_mobilenetv2": 1_280},
}
WAYS = {  # what is computed once of the images, and by which part; then epochs, and by which
    "ours": (("maps", "maps"), (10, "training")),
    "ours_wide": (("logits", "logits"), (60, "wide")),
    "paper": (("maps", "captum"), (100, "authors")),
    "paper_networks": (("maps", "captum_mobilenetv2"), (100, "authors_mobilenetv2")),
    "paper_networks_kd": (("logits", "logits_mobilenetv2"), (100, "authors_mobilenetv2")),
}
RATIOS = {
    "paper_over_ours": ("paper", "ours"),  # the same networks
    "paper_networks_over_ours": ("paper_networks", "ours"),  # each its own networks
    "paper_networks_kd_over_ours_wide": ("paper_networks_kd", "ours_wide"),  # distillation alone
    "paper_networks_over_ours_wide": ("paper_networks", "ours_wide"),  # the paper's method against distillation alone
}
TRAININGS = ("training", "float32")
TEACHER = ROOT / "recipes" / "results" / "teachers" / "convnet_cifar"
WIDTHS, WIDE = (32, 112, 128), (64, 112, 136)


def read_images(job: dict[str, Any]) -> Any:
    """Return the images of a part, a subset of the training split."""
    from timm_igkd import load_labeled_images

    images = load_labeled_images(str(Path(job["shared"]) / "data" / "cifar10"), "train")
    return images.subset(range(job["images"]))


def read_teacher(job: dict[str, Any]) -> Any:
    """Return a part's teacher in eval mode."""
    from timm_igkd import load_model

    if job["part"] in ("captum_mobilenetv2", "logits_mobilenetv2"):
        return create_model("mobilenetv2_cifar").eval()
    return load_model(f"local-dir:{TEACHER}").eval()


def create_student(job: dict[str, Any]) -> Any:
    """Return a part's student."""
    if job["part"] == "authors_mobilenetv2":
        return create_model("mobilenetv2_cifar", drop_blocks=5)
    return create_model("convnet_cifar", widths=WIDE if job["part"] == "wide" else WIDTHS)


def create_model(name: str, **arguments: Any) -> Any:
    """Return a model with random weights."""
    import timm
    import torch

    import timm_igkd  # noqa: F401 - its models

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **arguments)


def logits(job: dict[str, Any]) -> dict[str, float]:
    """Build a store of logits alone."""
    return build_store(job, method="none")


def maps(job: dict[str, Any]) -> dict[str, float]:
    """Build a store as the command does."""
    return build_store(job, n_steps="auto")


def build_store(job: dict[str, Any], **options: Any) -> dict[str, float]:
    """Build a store with logits, and return its rate."""
    from timm_igkd import IGOptions, compute_maps

    images, teacher = read_images(job), read_teacher(job)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compute_maps(teacher, images, folder, options=IGOptions(**options), logits=True, progress=False)
        return {"images_per_s": len(images) / (time.perf_counter() - started)}


def captum(job: dict[str, Any], with_maps: bool = True) -> dict[str, float]:
    """Attribute as captum's documentation does, and take the logits."""
    import torch
    from captum.attr import IntegratedGradients
    from timm.data import create_transform, resolve_model_data_config

    images, teacher = read_images(job), read_teacher(job)
    transform = create_transform(**resolve_model_data_config(teacher), is_training=False)
    attribute, batch_size = IntegratedGradients(teacher).attribute, 8 if with_maps else 64
    for start in range(-batch_size, len(images), batch_size):
        if start == 0:  # after a batch to warm up
            started = time.perf_counter()
        items = [images[index] for index in range(max(0, start), min(max(0, start) + batch_size, len(images)))]
        batch = torch.stack([transform(image) for image, _ in items])
        if with_maps:
            attribute(batch, target=torch.tensor([label for _, label in items]), n_steps=STEPS).abs().sum(1)
        with torch.inference_mode():
            teacher(batch)
    return {"images_per_s": len(images) / (time.perf_counter() - started)}


def plain_logits(job: dict[str, Any]) -> dict[str, float]:
    """Take the teacher's logits by a plain loop."""
    return captum(job, with_maps=False)


def training(job: dict[str, Any]) -> dict[str, Any]:
    """Train an epoch of the study in bfloat16 where the processor has it; see `train`."""
    from timm_igkd.rounded_bfloat16 import cpu_has_bfloat16

    return train(job, "bf16" if cpu_has_bfloat16() else "no")


def float32(job: dict[str, Any]) -> dict[str, Any]:
    """Train an epoch of the study in float32; see `train`."""
    return train(job, "no")


def train(job: dict[str, Any], precision: str) -> dict[str, Any]:
    """Train epochs of the study, each step followed by a bare pass."""
    import torch
    from accelerate import Accelerator
    from torch.nn.functional import cross_entropy

    from studies.cells import create_cell
    from studies.training import create_trainer
    from timm_igkd.overlay.device_images import DeviceImages
    from timm_igkd.progress import progress_bar

    generator, n = torch.Generator().manual_seed(0), job["images"] // EPOCHS_TIMED
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    images, levels = (torch.randint(0, 256, (n, c, 32, 32), dtype=torch.uint8, generator=generator) for c in (3, 1))
    labels, logits = torch.randint(0, 10, (n,), generator=generator), torch.randn(n, 10, generator=generator)
    data = DeviceImages(images, labels, levels, logits).to(accelerator.device)
    overlay_prob = 0.0 if job["part"] == "wide" else 0.1
    given = {"protocol": "fast", "overlay_prob": overlay_prob, "distill_loss_weight": 0.5, "temperature": 4.0}
    cell = create_cell("KD&IG", given | {"epochs": EPOCHS_TIMED + 1})
    student = create_student(job)
    trainer = create_trainer(cell, 0, data, student, None, accelerator)
    views = images[: cell.batch_size].to(accelerator.device).float().contiguous(memory_format=torch.channels_last)
    targets, train_step, bare_seconds = labels[: cell.batch_size].to(accelerator.device), trainer.train_step, 0.0

    def step_and_bare_pass(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal bare_seconds
        found, started = train_step(*args), time.perf_counter()
        with accelerator.autocast():
            loss = cross_entropy(student(views / 255), targets)
        loss.backward()
        student.zero_grad()
        bare_seconds += time.perf_counter() - started
        return found

    trainer.train_step = step_and_bare_pass  # type: ignore[method-assign]
    ratios, rates = [], []
    for epoch in range(EPOCHS_TIMED + 1):
        bare_seconds, started = 0.0, time.perf_counter()
        with progress_bar(total=trainer.steps, desc="epoch", unit="step", show=False) as bar:
            trainer.train_epoch(epoch, bar)
        seconds = time.perf_counter() - started - bare_seconds
        ratios.append(seconds / bare_seconds)
        rates.append(trainer.steps * cell.batch_size / seconds)
    rate, overhead = (statistics.median(values[1:]) for values in (rates, ratios))  # the first is the warm-up
    return {"images_per_s": rate, "overhead": overhead, "precision": precision}


def authors(job: dict[str, Any]) -> dict[str, float]:
    """Train with the paper's settings, images and maps as its authors' loader gives them."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

    read, student = read_images(job), create_student(job)
    images = [read[index] for index in range(len(read))]
    levels, logits = torch.rand(len(images), 1, 32, 32), torch.randn(len(images), 10)
    augment, to_tensor = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()]), ToTensor()

    class Overlaid(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple:
            image, label = images[index]
            view = to_tensor(image)
            if torch.rand(()) < 0.1:
                power = levels[index] ** (2 ** torch.rand(()))
                view = 0.5 * view + 0.5 * (power - power.min()) / (power.max() - power.min())
            return augment(view), label, logits[index]

    loader = torch.utils.data.DataLoader(Overlaid(), 64, shuffle=True, num_workers=2, persistent_workers=True)
    optimizer, seconds = torch.optim.Adam(student.parameters(), lr=1e-3), []
    student.train()
    for _ in range(3):
        started = time.perf_counter()
        for views, labels, teacher in loader:
            found = student(views)
            soft = kl_div((found / 2.5).log_softmax(1), (teacher / 2.5).softmax(1), reduction="batchmean")
            loss = 0.01 * 2.5**2 * soft + 0.99 * cross_entropy(found, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        seconds.append(time.perf_counter() - started)
    return {"images_per_s": len(images) / statistics.median(seconds[1:])}


def main() -> None:
    """Measure the parts in rounds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the images of a round")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TIMM_IGKD_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pipeline_cpu.json")
    parser.add_argument("--overhead", action="store_true", help="only a study's epoch over its bare passes, again")
    args = parser.parse_args()

    def images(part: str) -> int:
        least = 256 * EPOCHS_TIMED if part in (*TRAININGS, "wide") else 64
        return max(min(least, SIZES[part]), int(SIZES[part] * args.scale))

    def run(part: str) -> dict[str, Any]:
        found = run_child(Path(__file__), {"part": part, "images": images(part), "shared": str(args.shared)})
        if "error" in found:
            raise SystemExit(f"{part}: {found['error']}")
        return found

    from timm_igkd.rounded_bfloat16 import cpu_has_bfloat16

    # without it `training` is in float32 already
    trainings = TRAININGS if cpu_has_bfloat16() else TRAININGS[:1]
    parts = [part for part in SIZES if part not in TRAININGS or part in trainings]

    def overhead(rounds: list[dict[str, Any]]) -> dict[str, Any]:
        return {part: summarize([each[part]["overhead"] for each in rounds]) for part in trainings}

    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.overhead:
        rounds = alternating(trainings, args.rounds, run, "overhead")
        result = before | {"overhead": facts() | overhead(rounds) | {"rounds": rounds}}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(overhead(rounds)))
        return
    rounds = alternating(parts, args.rounds, run, "pipeline")
    hours = []
    for found in rounds:
        rate = {part: found[part]["images_per_s"] for part in parts}
        hours.append(
            {
                way: {what: IMAGES / rate[once] / 3600, "training": epochs * IMAGES / rate[train] / 3600}
                for way, ((what, once), (epochs, train)) in WAYS.items()
            }
        )
    result = facts() | {
        "images": IMAGES,
        "precision": rounds[0]["training"]["precision"],
        "epochs": {way: epochs for way, (_, (epochs, _)) in WAYS.items()},
        "measured_images": {part: images(part) for part in parts},
        "images_per_s": {p: statistics.median(found[p]["images_per_s"] for found in rounds) for p in parts},
        "hours": {
            way: {part: statistics.median(each[way][part] for each in hours) for part in hours[0][way]} for way in WAYS
        },
        **{
            name: summarize([sum(each[a].values()) / sum(each[b].values()) for each in hours])
            for name, (a, b) in RATIOS.items()
        },
        "study_over_bare_passes": overhead(rounds),
        "rounds": rounds,
    }
    result |= {"overhead": before["overhead"]} if "overhead" in before else {}  # measured by itself
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("images_per_s", "hours", *RATIOS, "study_over_bare_passes")}))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        job = json.loads(sys.argv[1])
        functions = {f.__name__: f for f in (maps, logits, captum, training, float32, authors)}
        functions |= {"wide": training, "captum_mobilenetv2": captum, "authors_mobilenetv2": authors}
        functions |= {"logits_mobilenetv2": plain_logits}
        print("\n" + json.dumps(functions[job["part"]](job)))
    else:
        main()
