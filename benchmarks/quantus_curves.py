"""Our deletion curves beside those of Quantus's PixelFlipping, on the same images and maps.

Quantus 0.6 breaks under NumPy 2.4, so it needs an environment of its own, with `pip install "numpy<2.3" quantus==0.6.0
opencv-python-headless`:

    python benchmarks/quantus_curves.py          # a minute on two CPU cores; CIFAR-10 and weights beside the repository

Images are grey, of one channel: PixelFlipping replaces values, not pixels, but takes only shares that divide the
pixels, which cannot be whole pixels of three channels. Maps have distinct values: it orders equal pixels as NumPy's
quicksort happens to, we in reading order. Its curve begins after the first share.
Writes benchmarks/results/quantus_curves.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import quantus
import torch

from timm_igkd import IGOptions, load_labeled_images, load_model
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import TeacherView, reduce_channels
from timm_igkd.data.items import read_item
from timm_igkd.environment import environment
from timm_igkd.evaluation.faithfulness import pixel_order, replacement_curve

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16


class Grey(torch.nn.Module):
    """A classifier of colour images that is shown grey ones, [B, 1, H, W]."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return its outputs."""
        return self.model(x.expand(-1, 3, -1, -1))


def main() -> None:
    """Compare and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantus_curves.json")
    arguments = parser.parse_args()
    weights = arguments.shared / "weights" / "paper_students" / "kd_92.29.safetensors"
    options = {"model_args": {"drop_blocks": 5}, "checkpoint": weights, "mean": (0, 0, 0), "std": (1, 1, 1)}
    teacher = load_model("mobilenetv2_cifar", **options).eval()
    model = Grey(teacher).eval()
    dataset, view = load_labeled_images(str(arguments.shared / "data" / "cifar10"), "test"), TeacherView(teacher)
    items = [read_item(dataset, index) for index in range(arguments.images)]
    inputs, labels = (
        torch.stack([view(image) for image, _ in items]).mean(1, keepdim=True),
        torch.tensor([label for _, label in items]),
    )
    with torch.no_grad():
        logits = model(inputs)
    engine = FastEngine(model, IGOptions(n_steps=20), 64, tuple(inputs.shape[1:]))
    maps = {
        "ig": reduce_channels(engine.attribute(inputs, 0 * inputs[:1], labels, logits).values, "abs_sum"),
        "random": torch.rand(inputs[:, 0].shape, generator=torch.Generator().manual_seed(0)),
    }
    result: dict[str, object] = {"quantus": quantus.__version__, "environment": environment(), "steps": STEPS}
    for name, values in maps.items():
        with torch.no_grad():
            ours = replacement_curve(model, inputs, 0 * inputs[:1], labels, pixel_order(values), STEPS).numpy()
        metric = quantus.PixelFlipping(
            features_in_step=inputs[0].numel() // STEPS,
            perturb_baseline=0.0,
            abs=False,
            normalise=False,
            disable_warnings=True,
        )
        theirs = np.array(
            metric(model, inputs.numpy(), labels.numpy(), values[:, None].numpy(), softmax=True, device="cpu")
        )
        result[name] = {
            "n": len(inputs),
            "largest_difference": float(np.abs(ours[:, 1:] - theirs).max()),
            "our_mean_curve": ours.mean(0).tolist(),
            "their_mean_curve": theirs.mean(0).tolist(),
        }
        print(name, result[name])
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
