"""Integrated gradients per second: captum as the paper calls it, captum at its best, and this package's engine.

    python benchmarks/attribution.py                                     # all teachers; minutes on two CPU cores each
    python benchmarks/attribution.py --teachers cifar --rounds 3 --shared ../shared

Variants, on the same images and teacher:
    a  captum with its default arguments, batch 8 (or the largest that fits in --memory_gb), 50 steps
    b  captum with the best `internal_batch_size` of a sweep, 50 steps
    c  the fast engine, the same 50 Gauss-Legendre steps
    d  the fast engine, n_steps="auto" at its default tolerance
    limit  the bare forward + input-gradient pass of the folded network at its best batch, divided by 50 steps

Every variant runs in a process of its own (peak memory is that process's), in rounds a, b, c, d, limit, a, b, …;
ratios are
medians of the ratios within a round. Maps are compared with 1,000 midpoint steps. Random weights serve for speed
only: their rows have no accuracy. Writes a JSON file of rows and prints a table.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("a", "b", "c", "d", "limit")
TEACHERS = ("cifar", "mobilenetv2", "resnet50", "vit_small")
SWEEP = {"cifar": (16, 32, 64), "mobilenetv2": (8, 16), "resnet50": (8, 16), "vit_small": (8, 16)}
SWEEP_IMAGES = {"cifar": 8, "mobilenetv2": 4, "resnet50": 4, "vit_small": 4}
LIMIT_BATCHES = {
    "cifar": (8, 16, 32, 64),
    "mobilenetv2": (2, 4, 8, 16),
    "resnet50": (4, 8, 16),
    "vit_small": (4, 8, 16),
}
# images timed per variant on a CPU; on a GPU `--images_factor` multiplies them
TIMED = {
    "cifar": {"a": 8, "b": 16, "c": 32, "d": 64, "limit": 0},
    "mobilenetv2": {"a": 2, "b": 8, "c": 8, "d": 16, "limit": 0},
    "resnet50": {"a": 1, "b": 8, "c": 8, "d": 8, "limit": 0},
    "vit_small": {"a": 1, "b": 8, "c": 8, "d": 8, "limit": 0},
}
ACCURACY_IMAGES = {"cifar": 64, "mobilenetv2": 8}
REFERENCE_STEPS = 1000


def load_teacher(name: str, shared: Path) -> tuple[Any, Any]:
    """Return (model, dataset) of one benchmark teacher."""
    import timm

    from timm_igkd import load_labeled_images, load_model

    if name == "cifar":
        model = load_model(
            "mobilenetv2_cifar",
            model_args={"drop_blocks": 5},
            checkpoint=shared / "weights/paper_students/kd_92.29.safetensors",
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        return model, load_labeled_images(str(shared / "data/cifar10"), "test")
    dataset = load_labeled_images(str(shared / "data/imagenette_small"), "validation")
    if name == "mobilenetv2":
        return load_model(f"local-dir:{shared / 'weights/mobilenetv2_100.coral_in1k'}"), dataset
    architecture = {"resnet50": "resnet50", "vit_small": "vit_small_patch16_224"}[name]
    return timm.create_model(architecture, pretrained=False).eval(), dataset


class Work:
    """One variant's work in its own process."""

    def __init__(self, args: argparse.Namespace):
        import torch

        from timm_igkd.attribution import TeacherView
        from timm_igkd.model_loading import class_indices

        self.args, self.torch = args, torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, dataset = load_teacher(args.teacher, args.shared)
        view, indices = TeacherView(model), class_indices(model, dataset.class_names, dataset.num_classes)
        count = max(args.images, 1)
        items = [dataset.read(index * len(dataset) // count) for index in range(count)]
        self.shape = (3, *view.size)
        self.inputs = torch.stack([view(image) for image, _ in items]).to(self.device)
        labels = [label if indices is None else indices[label] for _, label in items]
        self.targets = torch.tensor(labels, device=self.device)
        self.baselines = torch.zeros_like(self.inputs[:1])
        self.model = model

    def engine(self, n_steps: int | str, chunk: int | None = None) -> Any:
        from timm_igkd.attribution import IGOptions
        from timm_igkd.chunking import activation_chunk
        from timm_igkd.ig_engine import FastEngine

        chunk = chunk or activation_chunk(self.model, self.shape, self.device)
        return FastEngine(self.model, IGOptions(n_steps=n_steps), chunk, self.shape, self.device)

    def captum(self, chunk: int | None) -> Any:
        from timm_igkd.attribution import CaptumEngine, IGOptions

        return CaptumEngine(self.model.to(self.device), IGOptions(), chunk)

    def synchronize(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def attribute(self, engine: Any, batch: int, count: int | None = None) -> tuple[Any, Any, float]:
        """Attribute all images in batches; return maps, relative deltas and seconds."""
        torch, maps, deltas = self.torch, [], []
        started = self.synchronize()
        for start in range(0, count or len(self.inputs), batch):
            part = slice(start, start + batch)
            inputs, targets = self.inputs[part], self.targets[part]
            with torch.no_grad():
                logits = engine.forward(inputs) if hasattr(engine, "forward") else engine.model(inputs)
            result = engine.attribute(inputs, self.baselines, targets, logits)
            maps.append(result.values.abs().sum(1).cpu())
            change = (result.values.sum((1, 2, 3)) - result.convergence_delta.to(self.device)).abs()
            deltas.append((result.convergence_delta.to(self.device).abs() / change.clamp_min(1e-12)).cpu())
        return torch.cat(maps), torch.cat(deltas), self.synchronize() - started

    def variant(self, name: str) -> dict[str, Any]:
        from timm_igkd.chunking import images_per_batch

        if name == "reference":
            return self.reference()
        if name == "sweep":
            return self.sweep()
        if name == "limit":
            return self.limit()
        if name in "ab":
            engine, batch = self.captum(self.args.chunk if name == "b" else None), min(8, len(self.inputs))
            if name == "b":
                batch = min(len(self.inputs), self.args.chunk)
        else:
            engine, batch = self.engine(50 if name == "c" else "auto"), images_per_batch(self.shape)
        self.attribute(engine, min(batch, 2 if name == "a" else batch), count=min(2, len(self.inputs)))  # warm-up
        maps, deltas, seconds = self.attribute(engine, batch)
        if self.args.keep:
            self.torch.save({"maps": maps, "deltas": deltas}, self.args.keep)
        return {"images_per_s": len(self.inputs) / seconds, "n": len(self.inputs), "batch": batch}

    def sweep(self) -> dict[str, Any]:
        """Time captum at several values of `internal_batch_size`."""
        found = {}
        for chunk in SWEEP[self.args.teacher]:
            engine, count = self.captum(chunk), len(self.inputs)
            self.attribute(engine, count, count=1)
            found[chunk] = count / self.attribute(engine, count, count=count)[2]
        return {"sweep": found, "chunk": max(found, key=found.__getitem__)}

    def limit(self) -> dict[str, Any]:
        """Time the bare forward and input-gradient pass, nothing else."""
        torch, engine, best = self.torch, self.engine(50), {}
        for batch in LIMIT_BATCHES[self.args.teacher]:
            points = self.inputs[:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
            for repeats in (1, max(2, self.args.limit_pairs // batch)):
                started = self.synchronize()
                for _ in range(repeats):
                    leaf = points.detach().requires_grad_()
                    torch.autograd.grad(engine.model(leaf)[:, 0].sum(), leaf)
                best[batch] = repeats * batch / (self.synchronize() - started)
        return {"images_per_s": max(best.values()) / 50, "batch": max(best, key=best.__getitem__), "n": 0}

    def reference(self) -> dict[str, Any]:
        """Keep maps of 1,000 midpoint steps."""
        torch, engine, n = self.torch, self.engine(50), REFERENCE_STEPS
        nodes = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        sums = torch.zeros_like(self.inputs, dtype=torch.float64)
        for image in range(len(self.inputs)):
            images = torch.full((n,), image, device=self.device)
            for _, gradient in engine.gradients(self.inputs, self.baselines, self.targets, images, nodes):
                sums[image] += gradient.sum(0)
        maps = (self.inputs * (sums / n).float()).abs().sum(1).cpu()
        torch.save({"maps": maps}, self.args.keep)
        return {"n": len(self.inputs)}


def run_child(args: argparse.Namespace, teacher: str, variant: str, images: int, **extra: Any) -> dict[str, Any]:
    """Run one variant in a process of its own and return what it measured; with peak_memory_mb, or an error."""
    command = [sys.executable, __file__, "--child", variant, "--teacher", teacher, "--images", str(images)]
    command += ["--shared", str(args.shared), "--limit_pairs", str(args.limit_pairs)]
    for name, value in extra.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        return {"error": last}
    return json.loads(done.stdout.splitlines()[-1])


def accuracy(kept: Path, reference: Path) -> dict[str, Any]:
    """Compare a variant's maps with the reference: per-image correlation and mean absolute error after min-max."""
    import torch

    def unit(maps: Any) -> Any:
        flat = maps.flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        return (flat - low) / (high - low)

    found, expected = torch.load(kept, weights_only=True), torch.load(reference, weights_only=True)
    maps, truth = unit(found["maps"]), unit(expected["maps"])
    centred, truth_centred = maps - maps.mean(1, keepdim=True), truth - truth.mean(1, keepdim=True)
    correlation = (centred * truth_centred).sum(1) / (centred.norm(dim=1) * truth_centred.norm(dim=1))
    error = (maps - truth).abs().mean(1)
    return {
        "corr_median": float(correlation.median()),
        "corr_worst": float(correlation.min()),
        "share_corr_ge_099": float((correlation >= 0.99).float().mean()),
        "mae_median": float(error.median()),
        "mae_worst": float(error.max()),
        "delta_median": float(found["deltas"].median()),
        "delta_p90": float(found["deltas"].quantile(0.9)),
        "accuracy_n": len(maps),
    }


def measure_teacher(args: argparse.Namespace, teacher: str, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one teacher."""
    timed = {variant: images * args.images_factor for variant, images in TIMED[teacher].items()}
    sweep = run_child(args, teacher, "sweep", SWEEP_IMAGES[teacher])
    chunk = sweep.get("chunk", SWEEP[teacher][0])
    print(f"{teacher}: captum sweep {sweep}", flush=True)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        measured = {}
        for variant in VARIANTS:
            extra = {"chunk": chunk} if variant == "b" else {}
            measured[variant] = run_child(args, teacher, variant, timed[variant], **extra)
            print(f"{teacher} round {number} {variant}: {measured[variant]}", flush=True)
        rounds.append(measured)
    rows = [row_of(teacher, variant, rounds, chunk) for variant in VARIANTS]
    if teacher in ACCURACY_IMAGES and not args.no_accuracy:
        count, reference = ACCURACY_IMAGES[teacher], folder / "reference.pt"
        run_child(args, teacher, "reference", count, keep=reference)
        for row, variant in zip(rows, VARIANTS[:4], strict=False):
            kept, extra = folder / f"{variant}.pt", ({"chunk": chunk} if variant != "a" else {})
            # a and b are the same sums; a's own call would take hours, so b's maps stand for both
            run_child(
                args, teacher, "b" if variant == "a" else variant, count, keep=kept, **(extra or {"chunk": chunk})
            )
            row |= accuracy(kept, reference)
    return rows


def row_of(teacher: str, variant: str, rounds: list[dict[str, dict[str, Any]]], chunk: int) -> dict[str, Any]:
    """Summarise the rounds of one variant; ratios are taken within rounds."""

    def ratio(other: str) -> float | None:
        pairs = [
            found[variant]["images_per_s"] / found[other]["images_per_s"]
            for found in rounds
            if "images_per_s" in found[variant] and "images_per_s" in found[other]
        ]
        return statistics.median(pairs) if pairs else None

    measured = [found[variant] for found in rounds if "images_per_s" in found[variant]]
    empty = dict.fromkeys(("corr_median", "corr_worst", "share_corr_ge_099", "delta_median", "delta_p90"))
    row: dict[str, Any] = {"teacher": teacher, "variant": variant, **empty, "rounds": len(measured)}
    row["dataset"] = "cifar10 test" if teacher == "cifar" else "imagenette_small validation"
    row["weights"] = "trained" if teacher in ACCURACY_IMAGES else "random: speed only"
    if not measured:
        return row | {"images_per_s": None, "n": 0, "error": rounds[0][variant].get("error")}
    rates = [found["images_per_s"] for found in measured]
    row |= {"images_per_s": statistics.median(rates), "images_per_s_min": min(rates), "images_per_s_max": max(rates)}
    row |= {"n": measured[0]["n"], "batch": measured[0]["batch"], "device": measured[0]["device"]}
    row["peak_memory_mb"] = max(found["peak_memory_mb"] for found in measured)
    row |= {"ratio_to_a": ratio("a"), "ratio_to_b": ratio("b"), "efficiency": ratio("limit")}
    return row | ({"internal_batch_size": chunk} if variant == "b" else {})


def print_table(rows: list[dict[str, Any]]) -> None:
    def show(value: Any, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    columns = (
        "teacher variant images_per_s ratio_to_a ratio_to_b efficiency corr_median corr_worst share_corr_ge_099".split()
    )
    columns += "delta_median delta_p90 peak_memory_mb".split()
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print(
            "| " + " | ".join(show(row.get(column), 4 if column.startswith("corr") else 3) for column in columns) + " |"
        )


def child(args: argparse.Namespace) -> None:
    """Measure one variant and print it as one line of JSON."""
    if args.child == "a" and args.memory_gb:
        limit = int(args.memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit + (8 << 30), resource.RLIM_INFINITY))
    work = Work(args)
    found = work.variant(args.child)
    found["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if work.device.type == "cuda":
        found["peak_memory_mb"] = round(work.torch.cuda.max_memory_allocated() / 2**20)
    found["device"] = str(work.device)
    print(json.dumps(found))


def main() -> None:
    """Measure all teachers, or, with --child, one variant of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attribution.json"))
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", "../shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/ and weights/")
    parser.add_argument("--images_factor", type=int, default=1, help="times as many images, for a GPU")
    parser.add_argument("--limit_pairs", type=int, default=480)
    parser.add_argument("--no_accuracy", action="store_true")
    parser.add_argument("--memory_gb", type=float, default=0)
    for name in ("child", "teacher", "keep"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    if not args.shared.is_dir():
        raise SystemExit(f"{args.shared} does not exist; name the folder with data/ and weights/ by --shared")
    from timm_igkd.environment import environment
    from timm_igkd.store_files import write_json

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for teacher in args.teachers:
            rows += measure_teacher(args, teacher, Path(folder))
            result = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "rows": rows}
            write_json(args.out, result)
    print_table(rows)


if __name__ == "__main__":
    main()
