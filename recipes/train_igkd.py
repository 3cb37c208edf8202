"""Distil a student with integrated-gradients overlays: teacher -> maps -> student -> evaluate -> report.

    accelerate launch recipes/train_igkd.py                                   # the digits demo, two CPU cores, minutes
    accelerate launch recipes/train_igkd.py --config recipes/configs/cifar10_cpu.yaml
    accelerate launch recipes/train_igkd.py --name mine --dataset user/images \\
        --teacher resnet50.a1_in1k --teacher-epochs 5 --student resnet18.a1_in1k

Everything is written under runs/<name>/. A stage whose output is complete is skipped; --resume goes on after a kill.
"""

import sys

from timm_igkd.__main__ import entry


def main(argv: list[str] | None = None) -> int:
    """Run the job; bad input is one line and exit code 2."""
    from timm_igkd.cli.distill_command import distill_command  # Ctrl-C is one line while that is imported

    return distill_command(sys.argv[1:] if argv is None else argv, "train_igkd", __doc__)


if __name__ == "__main__":
    entry(main)
