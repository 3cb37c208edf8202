"""One variant of benchmarks/attribution.py in a process of its own: reads a job as JSON, prints what it measured.

    python benchmarks/attribution_variants.py '{"variant": "c", "teacher": "cifar", "images": 8, "shared": "../shared"}'

Keys of a job: variant (a, b, c, d, limit, sweep, reference), teacher, images, shared (folder), and optionally chunk
(captum's `internal_batch_size`), dtype and compile (as of `compute_maps`, for c and d), limit_pairs, keep (a file for
maps and deltas), memory_gb (address space for a).
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from timm_igkd import load_labeled_images, load_model
from timm_igkd.attribution.chunk_gradient import Arithmetic
from timm_igkd.attribution.chunk_pool import ChunkPool
from timm_igkd.attribution.chunk_size import activation_chunk, images_per_batch
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import CaptumEngine, IGOptions, TeacherView
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.eval_mode import exact_arithmetic
from timm_igkd.models.output_names import class_indices

SWEEP = {"cifar": (16, 32, 64), "mobilenetv2": (8, 16), "resnet50": (4, 8, 16), "vit_small": (4, 8, 16)}
LIMIT_BATCHES = {
    "cifar": (16, 32, 64),
    "mobilenetv2": (4, 8, 16),
    "resnet50": (2, 4, 8),
    "vit_small": (2, 4, 8),
}
CUDA_BATCHES = (16, 64, 256, 1024)
REFERENCE_STEPS = 1000


def load_teacher(name: str, shared: Path) -> tuple[Any, Any]:
    """Return (model, dataset) of one benchmark teacher."""
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
    torch.manual_seed(0)
    architecture = {"resnet50": "resnet50", "vit_small": "vit_small_patch16_224"}[name]
    return timm.create_model(architecture, pretrained=False).eval(), dataset


class Work:
    """A teacher, its images, and the variants' measurements.

    Args:
        job: see the module's docstring.
    """

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, dataset = load_teacher(job["teacher"], Path(job["shared"]))
        view, indices = TeacherView(self.model), class_indices(self.model, dataset.class_names, dataset.num_classes)
        count = max(job["images"], 1)
        items = [dataset.read(index * len(dataset) // count) for index in range(count)]
        self.shape = (3, *view.size)
        self.inputs = torch.stack([view(image) for image, _ in items]).to(self.device)
        labels = [label if indices is None else indices[label] for _, label in items]
        self.targets = torch.tensor(labels, device=self.device)
        self.baselines = torch.zeros_like(self.inputs[:1])

    def engine(self, n_steps: Any, eager: bool = False) -> FastEngine:
        """Return the engine as `compute_maps` sets it up on this device, or in eager float32 with small chunks."""
        keep_freed_memory()  # as the command does
        options = IGOptions(n_steps=n_steps)
        if eager:
            return FastEngine(self.model, options, min(SWEEP[self.job["teacher"]]), self.shape, self.device)
        chunk = activation_chunk(self.model, self.shape, self.device)
        arithmetic = Arithmetic(self.job.get("dtype", "float32"), self.job.get("compile", False))
        return FastEngine(self.model, options, chunk, self.shape, self.device, arithmetic=arithmetic)

    def captum(self, chunk: int | None) -> CaptumEngine:
        return CaptumEngine(self.model.to(self.device), IGOptions(), chunk)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def attribute(
        self, engine: Any, batch: int, count: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Attribute the images in batches; return maps [n, H, W], relative deltas [n], steps [n] and seconds."""
        maps, deltas, steps = [], [], []
        started = self.now()
        for start in range(0, count or len(self.inputs), batch):
            part = slice(start, start + batch)
            inputs, targets = self.inputs[part], self.targets[part]
            with torch.no_grad():
                logits = engine.forward(inputs) if isinstance(engine, FastEngine) else engine.model(inputs)
            with exact_arithmetic(self.device) if self.job.get("keep") else contextlib.nullcontext():
                result = engine.attribute(inputs, self.baselines, targets, logits)
            maps.append(result.values.abs().sum(1).cpu())
            steps.append(result.n_steps)
            delta = result.convergence_delta.to(self.device)
            change = (result.values.sum((1, 2, 3)) - delta).abs()
            deltas.append((delta.abs() / change.clamp_min(1e-12)).cpu())
        return torch.cat(maps), torch.cat(deltas), torch.cat(steps), self.now() - started

    def measure(self) -> dict[str, Any]:
        name, chunk, n = self.job["variant"], self.job.get("chunk"), len(self.inputs)
        if name in ("reference", "sweep", "limit"):
            return getattr(self, name)()
        if name in "ab":
            engine: Any = self.captum(chunk if name == "b" else None)
            batch = min(8 if name == "a" else chunk, n)
        else:
            engine, batch = self.engine(50 if name == "c" else "auto"), images_per_batch(self.shape, self.device)
        if self.device.type == "cuda":  # a whole batch, so that nothing is compiled or captured in the timing
            self.attribute(engine, batch, count=min(batch, n))
            torch.cuda.reset_peak_memory_stats()
        else:
            self.attribute(engine, min(batch, 2), count=1 if name == "a" else min(4, n))
        maps, deltas, steps, seconds = self.attribute(engine, batch)
        if self.job.get("keep"):
            torch.save({"maps": maps, "deltas": deltas}, self.job["keep"])
        found = {
            "images_per_s": n / seconds,
            "n": n,
            "batch": min(batch, n),
            "mean_steps": steps.double().mean().item(),
        }
        if isinstance(engine, FastEngine) and engine.arithmetic != Arithmetic():
            found["kernel"] = asdict(engine.arithmetic)
        return found | ({"chunk": engine.chunk_size} if engine.chunk_size else {})

    def sweep(self) -> dict[str, Any]:
        """Time captum at several values of `internal_batch_size`."""
        found = {}
        for chunk in SWEEP[self.job["teacher"]] if self.device.type == "cpu" else CUDA_BATCHES:
            engine, count = self.captum(chunk), len(self.inputs)
            batch = min(chunk, count)
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                self.attribute(engine, batch, count=1 if self.device.type == "cpu" else batch)
                found[chunk] = count / self.attribute(engine, batch)[-1]
            torch.cuda.empty_cache()
        return {"sweep": found, "chunk": max(found, key=found.__getitem__)}

    def limit(self) -> dict[str, Any]:
        """Time the engine's bare forward and input-gradient pass, its best batch and way of threading."""
        engine, found = self.engine(50, eager=True), {}
        ways: dict[str, Callable[..., Any]] = {"threads in a layer": lambda step, parts: [step(None) for _ in parts]}
        if self.device.type == "cpu":
            pool = ChunkPool(torch.get_num_threads())
            ways["chunks side by side"] = lambda step, parts: list(pool.map(step, parts))
        for batch in LIMIT_BATCHES[self.job["teacher"]] if self.device.type == "cpu" else CUDA_BATCHES:
            points = self.inputs[:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)

            def step(_: Any, points: torch.Tensor = points) -> torch.Tensor:
                leaf = points.detach().requires_grad_()
                with exact_arithmetic(self.device):
                    return torch.autograd.grad(engine.model(leaf)[:, 0].sum(), leaf)[0]

            repeats = 2 * max(1, round(self.job["limit_pairs"] / batch / 2))
            for way, run in ways.items():
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    run(step, [slice(0, 1)] * 2)
                    started = self.now()
                    run(step, [slice(0, 1)] * repeats)
                    found[f"{batch}, {way}"] = repeats * batch / (self.now() - started) / 50
            torch.cuda.empty_cache()
        best = max(found, key=found.__getitem__)
        return {"images_per_s": found[best], "batch": best, "n": 0, "all": found}

    def reference(self) -> dict[str, Any]:
        """Keep maps of 1,000 midpoint steps."""
        engine, n = self.engine(50, eager=True), REFERENCE_STEPS
        nodes = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        sums = torch.zeros_like(self.inputs, dtype=torch.float64)
        for image in range(len(self.inputs)):
            images = torch.full((n,), image, device=self.device)
            for _, gradient in engine.gradients(self.inputs, self.baselines, self.targets, images, nodes):
                sums[image] += gradient.sum(0)
        torch.save({"maps": (self.inputs * (sums / n).float()).abs().sum(1).cpu()}, self.job["keep"])
        return {"n": len(self.inputs)}


def main() -> None:
    """Measure one variant and print it as one line of JSON."""
    job = json.loads(sys.argv[1])
    if job.get("memory_gb"):
        limit = int((job["memory_gb"] + 8) * 2**30)  # torch's libraries alone map several GB
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    work = Work(job)
    found = work.measure() | {"device": str(work.device)}
    found["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if work.device.type == "cuda":
        # graphs of compiled kernels live in memory that is reserved, not allocated
        compiled = found.get("kernel", {}).get("compiled")
        peak = torch.cuda.max_memory_reserved() if compiled else torch.cuda.max_memory_allocated()
        found["peak_memory_mb"] = round(peak / 2**20)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
