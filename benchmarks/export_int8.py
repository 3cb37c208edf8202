"""The paper's released student kd_92.29 in ONNX and int8: accuracy, size, latency, and what one scale per layer costs.

    python benchmarks/export_int8.py --shared ../shared          # two minutes on an idle core

Runs `timm-igkd export --int8` (256 training images of CIFAR-10 calibrate, all 10,000 test images measure, both files
timed in turn on one thread) and quantises the same ONNX file once more per tensor.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from torch.utils.data import Subset

from timm_igkd import evaluate, load_labeled_images
from timm_igkd.cli.main import main as timm_igkd
from timm_igkd.evaluation.onnx_file import write_metadata
from timm_igkd.evaluation.onnx_model import load_onnx_model
from timm_igkd.export.int8 import FedBatches, quantise, spread_indices
from timm_igkd.export.record import read_export_record


def per_tensor_top1(folder: Path, data: Path) -> float:
    """Return top1 of the exported file quantised with one scale per layer, on the same images."""
    source, target, record = folder / "model.onnx", folder / "per_tensor.onnx", read_export_record(folder)
    train, test = (load_labeled_images(str(data), split) for split in ("train", "test"))
    fit, *_ = spread_indices(len(train), 256, train.labels)
    batches = FedBatches(load_onnx_model(source), Subset(train, fit))
    quantise(source, target, batches, float_edges=record.quantisation.float_edges, per_channel=False)
    write_metadata(target, record.metadata)
    return evaluate(load_onnx_model(target), test, measure_latency=False).metrics["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export_cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "export"
        data = args.shared / "data/cifar10"
        model = "--model mobilenetv2_cifar --model-args drop_blocks=5 --checkpoint {} --mean 0 0 0 --std 1 1 1".split()
        model[model.index("{}")] = str(args.shared / "weights/paper_students/kd_92.29.safetensors")
        images = ["--dataset", str(data), "--split", "train", "--evaluate-split", "test"]
        if code := timm_igkd(["export", *model, "--int8", *images, "--out", str(out)]):
            raise SystemExit(code)
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "exported_by": " ".join(["timm-igkd export", *model, "--int8", *images, "--out export"]),
            "per_tensor_top1": per_tensor_top1(out, data),
            "export": json.loads((out / "export.json").read_text()),
        }
    args.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
