"""bfloat16 in float32's arithmetic, for processors without it: speed and gradients beside float32's and torch's.

    python benchmarks/rounded_bfloat16.py      # two minutes on one CPU core without bfloat16

Student of recipes/configs/study_real.yaml, random weights, batches of 128 images of noise, channels_last, one thread.
Writes benchmarks/results/rounded_bfloat16_cpu.json: images a second of training steps in rounds, and how far
the gradient of one step is from that of torch's own bfloat16, as a share of the latter's length.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from paired import ROOT, alternating, facts, summarize

from timm_igkd.files import write_json

ARMS = ("float32", "rounded", "torch")
BATCH, WIDTHS = 128, (32, 112, 128)


def train(arm: str, seconds: float) -> tuple[float, Any]:
    """Return images a second, and the gradient of the first step."""
    import timm
    import torch

    from timm_igkd import rounded_bfloat16

    if arm == "rounded":
        rounded_bfloat16.compute_in_float32()
    torch.manual_seed(0)
    model = timm.create_model("convnet_cifar", num_classes=10, widths=WIDTHS).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=arm != "float32"):
            output = model(images)
        model.zero_grad()
        torch.nn.functional.cross_entropy(output.float(), labels).backward()

    step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        steps += 1
    rate = BATCH * steps / (time.perf_counter() - begun)
    rounded_bfloat16.compute_in_bfloat16()
    return rate, gradient


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of an arm in a round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rounded_bfloat16_cpu.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    gradients: dict[str, Any] = {}

    def measure(arm: str) -> float:
        rate, gradients[arm] = train(arm, args.seconds)
        return round(rate, 1)

    rounds = alternating(ARMS, args.rounds, measure, "images a second")
    own = gradients["torch"]
    result = {
        "rounds": rounds,
        "rounded_over_float32": summarize([one["rounded"] / one["float32"] for one in rounds]),
        "rounded_over_torch": summarize([one["rounded"] / one["torch"] for one in rounds]),
        "gradient_distance": {arm: float((gradients[arm] - own).norm() / own.norm()) for arm in ARMS if arm != "torch"},
    }
    write_json(args.out, facts() | result)
    print(result)


if __name__ == "__main__":
    main()
